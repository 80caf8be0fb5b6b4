"""The two halves of diffusers' autoencoders, each a network of its own: latents to pictures, and pictures to latents.

Shapes: B batch, C latent channels, h x w latent size, F latent frames, s pixels for each latent pixel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from enginewright.ground.signature import InputSpec
from enginewright.sources.flat import BATCH, Config, Family, Flat, side, sides

LATENT_FRAMES = 13
"""Of a clip of 49 frames, as CogVideoX draws them; the configuration of its autoencoder does not say."""


class Decode(nn.Module):
    """``autoencoder.decode`` as a module; an engine can replace that method."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        autoencoder.encoder = autoencoder.quant_conv = None
        self.autoencoder = autoencoder

    def forward(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """The signature of ``decode``; the generator is not used by it either."""
        del generator
        return self.autoencoder.decode(z, return_dict=return_dict)


class Encode(nn.Module):
    """``autoencoder.encode`` without the distribution around what it computes."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        autoencoder.decoder = autoencoder.post_quant_conv = None
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, sh, sw) -> mean and logarithm of the variance, (B, 2C, h, w)."""
        parameters: Tensor = self.autoencoder.encode(x).latent_dist.parameters
        return parameters


class FlatDecoder(Flat):
    """Latents to pictures."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(Decode(inner))

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, sh, sw); a clip has its frames after the channels."""
        return self.ask(z=self.like(z))


class FlatEncoder(Flat):
    """Pictures to what ``DiagonalGaussianDistribution`` of diffusers is made from."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(Encode(inner))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, sh, sw) -> (B, 2C, h, w)."""
        output: Tensor = self.inner(x=self.like(x))
        return output.float()


def decoder_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Any height and width."""
    halvings = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = (size // halvings for size in sides(config["sample_size"], 512))
    shape = (BATCH, config["latent_channels"], side("height", height), side("width", width))
    return (InputSpec(name="z", shape=shape),)


def encoder_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Height and width in whole latent pixels."""
    halvings = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = sides(config["sample_size"], 512)
    shape = (BATCH, config["in_channels"], side("height", height, halvings), side("width", width, halvings))
    return (InputSpec(name="x", shape=shape, low=-1, high=1),)


def clip_decoder_inputs(config: Config) -> tuple[InputSpec, ...]:
    """The frames are fixed: it decodes them in a Python loop, two at a time."""
    halvings = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = (config[key] // halvings for key in ("sample_height", "sample_width"))
    shape = (BATCH, config["latent_channels"], LATENT_FRAMES, side("height", height), side("width", width))
    return (InputSpec(name="z", shape=shape),)


DECODERS = {
    "AutoencoderKL": Family(flat=FlatDecoder, inputs=decoder_inputs),
    "AutoencoderKLCogVideoX": Family(flat=FlatDecoder, inputs=clip_decoder_inputs),
}
"""By class name in diffusers."""

ENCODERS = {"AutoencoderKL": Family(flat=FlatEncoder, inputs=encoder_inputs)}
"""By class name in diffusers."""
