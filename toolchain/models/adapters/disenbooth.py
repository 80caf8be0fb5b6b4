"""DisenBooth: the U-Net of Stable Diffusion with a subject's adapter, and a vector for all that the subject is not.

Source: Chen et al. 2023, arXiv:2305.03374 (ICLR 2024): a text with a rare word carries the subject, and what an image
has besides (pose, background) is a vector that is added to every text state; it is left out, or kept to be used again.
Checked against forchchch/DisenBooth at commit 19b1ab7 by reading and by count: sizes and order of the image adapter,
and that its vector is added to the text states before the U-Net. The base is diffusers' ``UNet2DConditionModel``.

How much of the vector is added is an input here (``eta``); the release adds all or none. The image feature is CLIP
ViT-H/14's, which is no part of this. Adapters on the text encoder, an option of the release, are left out.

Shapes: B batch, C channels, h x w latent size, N text tokens, D width of text states and image feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import require
from enginewright.ground.signature import InputSpec
from enginewright.models.blocks.low_rank import LowRank, Product, products
from enginewright.sources.contract import Published
from enginewright.sources.denoisers import TIMESTEP, FlatUNet
from enginewright.sources.flat import BATCH

PART = "subject"
"""What the U-Net's adapter is called."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A U-Net of Stable Diffusion 2, and its adapter.

    Args:
        widths: of the levels, the finest first; all but the coarsest attend to the text.
        heads: of each level's attention.
        layers: residual blocks of a level on the way down.
        groups: of its group norms.
        width: D.
        side: of the latent.
        text: N.
        rank: of the adapter on queries, keys, values and outputs of every attention layer.
    """

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    layers: int
    groups: int
    width: int
    side: int
    text: int
    rank: int


PUBLISHED = {
    "sd2.1": Config(
        widths=(320, 640, 1280, 1280),
        heads=(5, 10, 20, 20),
        layers=2,
        groups=32,
        width=1024,
        side=64,
        text=77,
        rank=4,
    )
}
SHIPPED: dict[str, Config] = {}
TINY = Config(widths=(8, 16), heads=(2, 4), layers=1, groups=4, width=12, side=8, text=5, rank=2)
OUTPUTS = ("noise",)
FIGURES: dict[str, tuple[Published, ...]] = {}


class ImageAdapter(nn.Module):
    """What an image has besides its subject: f = MLP(m x) + m x, where m masks the features of x, each by a share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.mask = nn.Parameter(torch.zeros(width))  # before its sigmoid: half of each feature at first

    def forward(self, feature: Tensor) -> Tensor:
        """Feature (B, D) -> (B, D)."""
        masked = self.mask.sigmoid() * feature
        return self.adapter(masked) + masked


class DisenBooth(nn.Module):
    """A U-Net whose text states get a share of an image's vector."""

    def __init__(self, unet: nn.Module, width: int) -> None:
        super().__init__()
        self.unet = FlatUNet(unet)
        self.irrelevant = ImageAdapter(width)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, image_feature: Tensor, eta: Tensor
    ) -> Tensor:
        """(B, C, h, w), (B,), (B, N, D), (B, D), (B,) -> (B, C, h, w)."""
        vector = eta[:, None] * self.irrelevant(image_feature)  # (B, D)
        return self.unet(sample, timestep, encoder_hidden_states + vector[:, None])


def unet_config(config: Config) -> dict[str, Any]:
    """The sizes of the base as diffusers names them."""
    levels = len(config.widths)
    return {
        "sample_size": config.side,
        "block_out_channels": config.widths,
        "attention_head_dim": config.heads,  # as diffusers calls their number in these networks
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "cross_attention_dim": config.width,
        "use_linear_projection": True,
        "down_block_types": (*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
    }


def attach(unet: nn.Module, rank: int) -> nn.Module:
    """Put adapters beside queries, keys, values and outputs of all attention layers, in place; they add nothing yet."""
    for path, module in list(unet.named_modules()):
        if path.rpartition(".")[2] not in ("attn1", "attn2"):
            continue
        attention: Any = module
        for owner, name in ((attention, "to_q"), (attention, "to_k"), (attention, "to_v"), (attention.to_out, "0")):
            linear = getattr(owner, name)
            product = Product(linear, rank)
            nn.init.normal_(product.down.weight, std=1 / rank)
            setattr(owner, name, LowRank(linear, product, part=PART))
    return unet


def build(config: Config) -> DisenBooth:
    """A U-Net with adapters whose products are a fifth or so of a fresh layer's output."""
    unet = require("diffusers", extra="diffusers").UNet2DConditionModel(**unet_config(config))
    model = DisenBooth(attach(unet, config.rank), config.width)
    for product in products(model):
        nn.init.normal_(product.up.weight, std=0.2 * (config.rank / product.down.in_features) ** 0.5)
    return model


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """At one size of picture and text."""
    return (
        InputSpec(name="sample", shape=(BATCH, 4, config.side, config.side)),
        TIMESTEP,
        InputSpec(name="encoder_hidden_states", shape=(BATCH, config.text, config.width)),
        InputSpec(name="image_feature", shape=(BATCH, config.width), role="condition"),
        InputSpec(name="eta", shape=(BATCH,), low=0, high=1, role="strength"),
    )
