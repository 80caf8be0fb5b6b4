"""Switti's picture decoder: from a map of summed codes to pixels, by residual convolutions on maps that double in side.

Source: Esser et al. 2021, arXiv:2012.09841 (VQGAN), as Voronov et al. 2024, arXiv:2412.01819, use it. Checked against
yandex-research/switti at 3b286b5: parameter counts, order of operations, and equal pictures with the same weights at a
tiny size. Attribute names are those of a released checkpoint; the encoder, which drawing does not need, is left out.

Shapes: B batch, C channels, Y x X cells, R side of the map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of the decoder.

    Args:
        widths: channels of each level, the finest first; a level is twice as wide and high as the one after it.
        channels: of a code.
        side: of the map, usually; the network takes others.
        groups: of each norm.
        blocks: residual blocks of a level.
    """

    widths: tuple[int, ...] = (160, 160, 320, 320, 640)
    channels: int = 32
    side: int = 32
    groups: int = 32
    blocks: int = 3


PUBLISHED = {"512": Config()}
TINY = Config(widths=(8, 16), channels=8, side=5, groups=4, blocks=2)
SHIPPED: dict[str, Config] = {}
OUTPUTS = ("image",)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a norm and a SiLU, beside a residual."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, Y, X) -> (B, C', Y, X)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class CellAttention(nn.Module):
    """Attention of all cells to all, by one head, beside a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, Y, X) -> (B, C, Y, X)."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, dim=-1)  # each (B, 1, Y*X, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].mT
        return x + self.proj_out(y.reshape(x.shape))


class Doubled(nn.Module):
    """Repeat each cell in a square of four, then convolve."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, Y, X) -> (B, C, 2Y, 2X)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.attn_1 = CellAttention(width, groups)
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, Y, X) -> (B, C, Y, X)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one width, each with attention at the coarsest level, then a doubling but at the finest."""

    def __init__(self, config: Config, level: int) -> None:
        super().__init__()
        coarsest = len(config.widths) - 1
        width, before = config.widths[level], config.widths[min(level + 1, coarsest)]
        self.block = nn.ModuleList(
            ResidualBlock(before if index == 0 else width, width, config.groups) for index in range(config.blocks)
        )
        self.attn = nn.ModuleList(
            CellAttention(width, config.groups) for _ in range(config.blocks if level == coarsest else 0)
        )
        self.upsample = nn.Identity() if level == 0 else Doubled(width)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, Y, X) -> (B, C', 2Y, 2X)."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return self.upsample(x)


class Levels(nn.Module):
    """From a map of codes to colours, level after level, the coarsest first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.widths[-1]
        self.conv_in = nn.Conv2d(config.channels, width, 3, padding=1)
        self.mid = Middle(width, config.groups)
        self.up = nn.ModuleList(Level(config, level) for level in range(len(config.widths)))
        self.norm_out = nn.GroupNorm(config.groups, config.widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(config.widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, Y, X) -> (B, 3, y, x), 2^(levels - 1) times as large."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Draw the picture that a map of summed codes stands for."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.decoder = Levels(config)

    def forward(self, map: Tensor) -> Tensor:
        """Map (B, C, R, R) -> pixels (B, 3, 16R, 16R) from -1 to 1."""
        return self.decoder(self.post_quant_conv(map)).clamp(-1, 1)


def build(config: Config) -> Decoder:
    """The decoder with PyTorch's own start."""
    return Decoder(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """The map; pictures of other sides than the usual one are drawn too."""
    batch = Dim(name="batch", low=1, typical=1, high=4)
    side = Dim(name="side", low=2, typical=config.side, high=2 * config.side)
    return (InputSpec(name="map", role="sample", shape=(batch, config.channels, side, side)),)
