"""DiCo: a convolutional diffusion denoiser in a U of three widths, with a gate on channels instead of self-attention.

Source: Ai et al. 2025, arXiv:2505.11196, section 3. Checked against shallowdream204/DiCo at commit b596b05: parameter
counts, order of operations, and outputs with the same weights (equal to 6e-15 in float64, but for the mean below). What
differs from it:

* Maps lie channels last between convolutions, and 1x1 convolutions are linear layers: :func:`from_release` turns the
  release's weights into these. Layer norms over channels then need no transposes of their own.
* The mean over a map is taken in float32.
* Labels are never dropped at random, which only training needs. Guidance is the sampler's, or that of the pass
  ``merge_guidance``, which guides the first 3 of 4 channels, as the release does, with ``channels=3``.
* Digits, which the release has not, are drawn as ``dit:digits`` draws them: weights given for them predict velocity.

There is no code of positions, so that one network takes maps of any size that halves twice.

Shapes: B batch, C channels of a latent, Y x X its cells (later halves and quarters of them), D width of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.models.blocks.embedders import LabelEmbedder, TimestepEmbedder
from enginewright.models.blocks.transformer import Mlp
from enginewright.passes.traits import StreamBlock
from enginewright.sources.contract import Published
from enginewright.validation.contract import SamplingTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of DiCo: five stages on maps of full, half, quarter, half and full side, of widths 1, 2, 4, 2 and 2.

    Args:
        width: channels of the first stage.
        depths: blocks of each stage.
        mlp_ratio: hidden width of a block's MLP, in widths of its stage.
        side: the usual side of the input in latent (or pixel) cells; the network takes others.
    """

    width: int
    depths: tuple[int, int, int, int, int]
    mlp_ratio: int = 2
    side: int = 32
    channels: int = 4
    classes: int = 1000


PUBLISHED = {
    "S": Config(width=128, depths=(5, 4, 4, 4, 4)),
    "B": Config(width=256, depths=(5, 4, 4, 4, 4)),
    "L": Config(width=352, depths=(9, 8, 9, 8, 9)),
    "XL": Config(width=416, depths=(9, 9, 10, 9, 9)),
    "H": Config(width=416, depths=(14, 12, 10, 12, 14), mlp_ratio=4),
}
SHIPPED: dict[str, Config] = {}
TINY = Config(width=16, depths=(1, 1, 1, 1, 1), side=28, channels=1, classes=10)
OUTPUTS = ("prediction_and_variance",)
FIGURES = {
    size: (
        Published(figure="parameter_count", value=count, source="arXiv:2505.11196, table 1"),
        Published(figure="macs", value=macs, source="arXiv:2505.11196, table 1; its Gflops are multiply-accumulates"),
    )
    for size, count, macs in (
        ("S", "33.1 M", "4.25 G"),
        ("B", "130.0 M", "16.88 G"),
        ("L", "463.9 M", "60.24 G"),
        ("XL", "701.2 M", "87.30 G"),
        ("H", "1 B", "194.15 G"),
    )
}


class ChannelGate(nn.Module):
    """Scale each channel by what all channels hold on average: the paper's compact channel attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, Y, X) -> gates (B, 1, 1, D)."""
        mean = x.float().mean((2, 3)).to(x.dtype)  # in float32: half precision cannot sum thousands of cells
        return self.linear(mean).sigmoid()[:, None, None]


class ConvModule(nn.Module):
    """Mix channels, then neighbours, then gate the channels and mix them again.

    It is no feed-forward, though two linear layers stand around a GELU: neighbours and the gate come between them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Linear(width, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.gate = ChannelGate(width)
        self.conv3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, Y, X, D) -> (B, Y, X, D)."""
        x = F.gelu(self.conv2(self.conv1(x).permute(0, 3, 1, 2)))  # (B, D, Y, X)
        return self.conv3(x.permute(0, 2, 3, 1) * self.gate(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, Y, X, D), shift and scale (B, 1, 1, D) -> (B, Y, X, D)."""
    return x * (1 + scale) + shift


class Block(nn.Module, StreamBlock):
    """Convolutions and an MLP, each with shift, scale and gate from the condition (adaLN-zero)."""

    def __init__(self, width: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.conv = ConvModule(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, mlp_ratio * width, approximate="none")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, Y, X, D), c (B, D) -> (B, Y, X, D)."""
        condition = self.adaLN_modulation(c)[:, None, None].chunk(6, dim=3)  # each (B, 1, 1, D)
        shift_c, scale_c, gate_c, shift_m, scale_m, gate_m = condition
        x = x + gate_c * self.conv(modulate(self.norm1(x), shift_c, scale_c))
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class Condition(nn.Module):
    """What the timestep and the class say to blocks of one width."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """t (B,), y (B,) -> (B, D)."""
        return self.t_embedder(t) + self.y_embedder(y)


class Down(nn.Module):
    """Halve both sides of a map and double its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, Y, X, D) -> (B, Y/2, X/2, 2D)."""
        return F.pixel_unshuffle(self.conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)


class Up(nn.Module):
    """Double both sides of a map and halve its width, then join the map of that size on the way down."""

    def __init__(self, width: int, kept: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.join = nn.Linear(width // 2 + kept, out)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        """x (B, Y/2, X/2, D), kept (B, Y, X, D') -> (B, Y, X, D'')."""
        x = F.pixel_shuffle(self.conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)  # (B, Y, X, D/2)
        return self.join(torch.cat([x, kept], dim=3))


class FinalLayer(nn.Module):
    """The last modulated norm, and a convolution to prediction and variance."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.out_proj = nn.Conv2d(width, channels, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, Y, X, D), c (B, D) -> (B, 2C, Y, X)."""
        shift, scale = self.adaLN_modulation(c)[:, None, None].chunk(2, dim=3)  # each (B, 1, 1, D)
        return self.out_proj(modulate(self.norm_final(x), shift, scale).permute(0, 3, 1, 2))


class Stage(nn.ModuleList):
    """Blocks of one width, one after another."""

    def __init__(self, width: int, depth: int, mlp_ratio: int) -> None:
        super().__init__(Block(width, mlp_ratio) for _ in range(depth))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, Y, X, D), c (B, D) -> (B, Y, X, D)."""
        for block in self:
            x = block(x, c)
        return x


class DiCo(nn.Module):
    """Predict noise and the next step's variance from a latent, its timestep and class."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, ratio = config.width, config.mlp_ratio
        self.stem = nn.Conv2d(config.channels, width, 3, padding=1)
        self.conditions = nn.ModuleList(Condition(scale * width, config.classes) for scale in (1, 2, 4))
        scales = zip((1, 2, 4, 2, 2), config.depths, strict=True)
        self.stages = nn.ModuleList(Stage(scale * width, depth, ratio) for scale, depth in scales)
        self.downs = nn.ModuleList([Down(width), Down(2 * width)])
        self.ups = nn.ModuleList([Up(4 * width, 2 * width, 2 * width), Up(2 * width, width, 2 * width)])
        self.final_layer = FinalLayer(2 * width, 2 * config.channels)
        self.initialize()

    def initialize(self) -> None:
        """The authors' start: Xavier linears and convolutions, small embeddings, all gates and the output at zero."""
        for name, weight in self.named_parameters():
            if "adaLN_modulation" in name or "out_proj" in name or name.endswith("bias"):
                nn.init.zeros_(weight)
            elif "embedder" in name:
                nn.init.normal_(weight, std=0.02)
            else:
                nn.init.xavier_uniform_(weight.flatten(1) if name == "stem.weight" else weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, Y, X), t (B,) in steps, y (B,) class or none -> (B, 2C, Y, X), prediction and variance."""
        c_full, c_half, c_quarter = (condition(t, y) for condition in self.conditions)  # (B, D), (B, 2D), (B, 4D)
        full = self.stages[0](self.stem(x).permute(0, 2, 3, 1), c_full)  # (B, Y, X, D)
        half = self.stages[1](self.downs[0](full), c_half)  # (B, Y/2, X/2, 2D)
        h = self.stages[2](self.downs[1](half), c_quarter)  # (B, Y/4, X/4, 4D)
        h = self.stages[3](self.ups[0](h, half), c_half)  # (B, Y/2, X/2, 2D)
        h = self.stages[4](self.ups[1](h, full), c_half)  # (B, Y, X, 2D): twice as wide as on the way down
        return self.final_layer(h, c_half)


RENAMED = {
    "x_embedder.proj": "stem",
    **{f"t_embedder_{i + 1}": f"conditions.{i}.t_embedder" for i in range(3)},
    **{f"y_embedder.embedding_table_{i}": f"conditions.{i}.y_embedder.embedding_table" for i in range(3)},
    "encoder_level_1": "stages.0",
    "encoder_level_2": "stages.1",
    "latent": "stages.2",
    "decoder_level_2": "stages.3",
    "decoder_level_1": "stages.4",
    "down1_2.body.0": "downs.0.conv",
    "down2_3.body.0": "downs.1.conv",
    "up3_2.body.0": "ups.0.conv",
    "up2_1.body.0": "ups.1.conv",
    "reduce_chan_level2": "ups.0.join",
    "reduce_chan_level1": "ups.1.join",
    **{f".conv{i}": f".conv.conv{i}" for i in (1, 2, 3)},
    ".ca.1": ".conv.gate.linear",
    ".conv4": ".mlp.fc1",
    ".conv5": ".mlp.fc2",
}
"""Parts of names in the release, and what they are here."""


def from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an authors' checkpoint by the names and in the shapes that they have here."""
    found = {}
    for name, tensor in state.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        found[name] = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor
    return found


def build(config: Config) -> DiCo:
    """The network with the authors' start."""
    return DiCo(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Noisy latent (or picture), timestep, class."""
    batch = Dim(name="batch", low=1, typical=2, high=64)
    height, width = (
        Dim(name=name, low=8, typical=config.side, high=2 * config.side, multiple_of=4) for name in ("height", "width")
    )
    return (
        InputSpec(name="x", role="sample", shape=(batch, config.channels, height, width)),
        InputSpec(name="t", role="timestep", shape=(batch,), low=0, high=999),
        InputSpec(name="y", role="condition", shape=(batch,), dtype="int64", low=0, high=config.classes + 1),
    )


def draws_digits(config: Config) -> bool:
    """Whether the network draws what the shipped judge reads."""
    return (config.channels, config.side, config.classes) == (1, 28, 10)


def task(size: str, config: Config) -> SamplingTask | None:
    """Draw digits and have them judged; other sizes have no judge."""
    if not draws_digits(config):
        return None
    from enginewright.models.blocks.digits import digits_task

    return digits_task(none=config.classes)


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]] | None:
    """Inputs met on real sampling runs, where the network draws digits."""
    if not draws_digits(config):
        return None
    from enginewright.models.blocks.digits import met_on_runs

    return lambda count, seed: met_on_runs(module, none=config.classes, count=count, seed=seed)
