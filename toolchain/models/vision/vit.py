"""ViT: the plain Vision Transformer, a classifier of images cut into patches, in DeiT's sizes, ViT-L and one of digits.

Sources: Dosovitskiy et al. 2021, arXiv:2010.11929 (ViT); Touvron et al. 2021, arXiv:2012.12877 (DeiT). Checked against
huggingface/transformers at 5.23, ``ViTForImageClassification``: parameter counts, order of operations, and outputs with
the same weights. What differs from it:

* Queries, keys and values are one projection, as in the authors' code, where transformers has three.
* The last norm reads the class token alone.
* Norms add 1e-6, as the authors' do, where transformers adds 1e-12.
* Dropout and stochastic depth, which do nothing when it runs, are left out.

Size ``digits`` is ours: 28 x 28 pixels in patches of 4 x 4, trained on 4,000 digits (toolchain/training/vit_digits.py).

Shapes: B batch, C channels, S side of an image, P side of a patch, N = (S/P)^2 patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.models.blocks.transformer import Block, start_small
from enginewright.passes.traits import PatchNetwork
from enginewright.sources.contract import Published
from enginewright.validation.contract import ClassifyingTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of ViT.

    Args:
        width: of a token.
        heads: attention heads.
        depth: blocks.
        side: side of the image in pixels.
        patch: side of a patch in pixels.
        channels: of the image.
        classes: logits.
        mlp_ratio: hidden width of an MLP in widths of a token.
    """

    width: int
    heads: int
    depth: int = 12
    side: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    mlp_ratio: int = 4


PUBLISHED = {
    "Ti/16": Config(width=192, heads=3),
    "S/16": Config(width=384, heads=6),
    "B/16": Config(width=768, heads=12),
    "L/16": Config(width=1024, heads=16, depth=24),
}
SHIPPED = {"digits": Config(width=64, heads=4, depth=6, side=28, patch=4, channels=1, classes=10)}
TINY = Config(width=32, heads=4, depth=3, side=24, patch=8, classes=10)
OUTPUTS = ("logits",)
FIGURES = {
    size: (
        Published(
            figure="parameter_count", value=count, source="huggingface/pytorch-image-models, results-imagenet.csv"
        ),
        Published(figure="macs", value=macs, source="arXiv:2210.09461 (ToMe), tables of unmerged models, from memory"),
    )
    for size, count, macs in (
        ("Ti/16", "5.72 M", "1.3 G"),
        ("S/16", "22.05 M", "4.6 G"),
        ("B/16", "86.57 M", "17.6 G"),
        ("L/16", "304.33 M", "61.6 G"),
    )
}


class ViT(nn.Module, PatchNetwork):
    """Tell the class of an image."""

    leading: ClassVar[int] = 1

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, 1 + (config.side // config.patch) ** 2, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, eps=1e-6) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)
        self.initialize()

    def initialize(self) -> None:
        """The authors' start: small linears, class token and positions."""
        self.apply(start_small)
        for table in (self.class_token, self.position):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, C, S, S) -> logits (B, classes)."""
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)  # (B, N, D)
        # A copy for each image: an expanded view of a parameter asks for gradients even where none are wanted.
        class_token = self.class_token.repeat(image.shape[0], 1, 1)
        x = torch.cat([class_token, patches], dim=1) + self.position  # (B, 1+N, D)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


RENAMED = {
    "cls_token": "class_token",
    "pos_embed": "position",
    "patch_embed.proj.": "patch_embed.",
}
"""Beginnings of names in the authors' checkpoints and timm's, and what they are here."""


def from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a DeiT checkpoint, or timm's, by the names that they have here; the shapes are the same."""
    found = {}
    for name, tensor in state.items():
        theirs = next((start for start in RENAMED if name.startswith(start)), "")
        found[RENAMED.get(theirs, "") + name.removeprefix(theirs)] = tensor
    return found


def build(config: Config) -> ViT:
    """The network with the authors' start."""
    return ViT(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Images with values of about unit variance; digits are white on black, from -1 to 1."""
    batch = Dim(name="batch", low=1, typical=2, high=64)
    shape = (batch, config.channels, config.side, config.side)
    if config.channels == 1:
        return (InputSpec(name="image", role="sample", shape=shape, low=-1, high=1),)
    return (InputSpec(name="image", role="sample", shape=shape),)


def task(size: str, config: Config) -> ClassifyingTask | None:
    """Tell digits that were held out from training; no other size was trained."""
    del config
    if size != "digits":
        return None
    from enginewright.models.blocks.digits import reading_task

    return reading_task()


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]] | None:
    """Digits that are neither trained on nor judged, where the network was trained on digits."""
    del module, config
    if size != "digits":
        return None
    from enginewright.models.blocks.digits import unjudged

    return unjudged
