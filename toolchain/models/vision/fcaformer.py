"""FcaFormer: a classifier whose attention also reads a few tokens that sum up what earlier blocks of a stage gave.

Source: Zhang et al. 2022, arXiv:2211.07198, section 3. Checked against hkzhang-git/FcaFormer at commit 7dcd8e0:
parameter counts, order of operations, and outputs with the same weights (equal to 4e-15 in float64). What differs:

* Of the summary tokens only keys and values are projected; the release projects their queries too and drops them. Its
  one projection to queries, keys and values is two here, and the first of them reads the map's tokens alone.
* The biases of positions and of summary tokens are one mask, added within one fused attention. Positions are looked up
  by rows and by columns, so that no index as large as the mask is kept.
* Layer scales start at ``Config.layer_scale``: at 1, not 1e-6, where blocks that nobody trained are as good as absent.
* Convolutions start with outputs as large as their inputs, not with weights of 0.02. A norm follows each, so training
  sees no difference; without it, batch norms that have met no picture let none through to the logits.
* All four stages share one MLP; the norm that the release has inside that of attention blocks stands in the block.

The plain size L0 is not here, since the release has no code for it; nor is the backbone with windows for detection.

Shapes: B batch, R side of the picture, S side of a map, N = S*S tokens, M summary tokens, D width (C of a map),
H heads, d = D/H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec
from enginewright.models.blocks.transformer import Mlp, bias_by_distance, start_small
from enginewright.passes.traits import CrossAttention, StreamBlock
from enginewright.sources.contract import Published


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of FcaFormer: two stages of convolutions, then two of attention, each on maps of half the side.

    Args:
        widths: channels of each stage.
        depths: blocks of each stage.
        heads: attention heads of the last two stages.
        side: side of the picture, a multiple of 32.
        classes: number of classes.
        reach: how many blocks back attention reads summary tokens; no published stage is deep enough to feel it.
        layer_scale: where the factors on each block's two halves start.
    """

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int]
    side: int = 224
    classes: int = 1000
    reach: int = 12
    layer_scale: float = 1.0


PUBLISHED = {
    "L1": Config(widths=(64, 128, 192, 320), depths=(2, 2, 6, 2), heads=(6, 10)),
    "L2": Config(widths=(96, 192, 320, 480), depths=(2, 2, 7, 2), heads=(10, 15)),
    "L3": Config(widths=(96, 192, 320, 512), depths=(3, 6, 12, 3), heads=(10, 16)),
    "L4": Config(widths=(128, 256, 512, 768), depths=(3, 6, 12, 3), heads=(16, 24)),
}
SHIPPED: dict[str, Config] = {}
TINY = Config(widths=(8, 16, 32, 64), depths=(1, 1, 3, 1), heads=(2, 4), side=96, classes=10)
OUTPUTS = ("logits",)
# The products counted there include those for queries of summary tokens, which the release computes and drops.
FIGURES = {
    size: (
        Published(figure="parameter_count", value=count, source="hkzhang-git/FcaFormer, models/fcaformer.py"),
        Published(figure="macs", value=macs, source="hkzhang-git/FcaFormer, models/fcaformer.py"),
    )
    for size, count, macs in (
        ("L1", "6.2 M", "1.37 G"),
        ("L2", "16.3 M", "3.6 G"),
        ("L3", "27.9 M", "6.7 G"),
        ("L4", "65.6 M", "14.5 G"),
    )
}


class NormedConv(nn.Sequential):
    """A convolution without bias, then batch norm; it keeps the side of a map, or divides it by the stride."""

    def __init__(self, inside: int, outside: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outside))


class Stem(nn.Sequential):
    """Two convolutions of stride 2: picture (B, 3, R, R) -> map (B, C, R/4, R/4)."""

    def __init__(self, width: int) -> None:
        super().__init__(NormedConv(3, width // 2, 3, stride=2), nn.GELU(), NormedConv(width // 2, width, 3, stride=2))


class PatchMerging(nn.Sequential):
    """Halve a map's side and change its channels: (B, C, S, S) -> (B, C', S/2, S/2)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(
            NormedConv(width, out, 1),
            nn.GELU(),
            NormedConv(out, out, 3, stride=2, groups=out),
            nn.GELU(),
            NormedConv(out, out, 1),
        )


class ConvBlock(nn.Module, StreamBlock):
    """ConvNeXt's block: a wide convolution of each channel, then an MLP on each place."""

    def __init__(self, width: int, *, layer_scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, approximate="none")
        self.scale = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, S, S) -> (B, C, S, S)."""
        y = self.depthwise(x).permute(0, 2, 3, 1)  # (B, S, S, C)
        return x + (self.scale * self.mlp(self.norm(y))).permute(0, 3, 1, 2)


class ConvStage(nn.ModuleList):
    """ConvNeXt's blocks of one width, one after another."""

    def __init__(self, width: int, depth: int, *, layer_scale: float) -> None:
        super().__init__(ConvBlock(width, layer_scale=layer_scale) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, S, S) -> (B, C, S, S)."""
        for block in self:
            x = block(x)
        return x


class ForwardCrossAttention(nn.Module, CrossAttention):
    """Attention of a map's tokens to themselves and to summary tokens of earlier blocks.

    Args:
        width: of a token.
        heads: attention heads.
        side: of the map.
        summaries: summary tokens that it reads; the first block of a stage reads none.
    """

    by_head = ("position_bias", "summary_bias")
    kept_whole = ("distance", "summary_scale", "summary_norm")
    distance: Tensor

    def __init__(self, width: int, heads: int, side: int, *, summaries: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.position_bias = nn.Parameter(torch.zeros(heads, side, side))  # by rows apart and columns apart
        place = torch.arange(side)
        self.register_buffer("distance", (place[:, None] - place).abs(), persistent=False)  # (S, S)
        if summaries:
            self.summary_scale = nn.Parameter(torch.ones(summaries, 1))
            self.summary_norm = nn.LayerNorm(width)
            self.summary_bias = nn.Parameter(torch.zeros(heads, summaries))

    def forward(self, x: Tensor, summaries: Tensor | None) -> Tensor:
        """x (B, N, D), normed, and summaries (B, M, D) -> (B, N, D)."""
        read, bias = x, bias_by_distance(self.position_bias, self.distance)  # (H, N, N)
        if summaries is not None:
            read = torch.cat([x, self.summary_norm(self.summary_scale * summaries)], dim=1)  # (B, N+M, D)
            bias = torch.cat([bias, self.summary_bias[:, None].expand(-1, x.shape[1], -1)], dim=2)  # (H, N, N+M)
        q, k, v = self.heads_of(x, read)  # (B, H, N, d), and twice (B, H, N+M, d)
        return self.join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]))


class FcaBlock(nn.Module):
    """Forward cross attention, summary tokens for later blocks, a convolution of each channel, and an MLP.

    The convolution replaces the tokens: it has no residual. The last block of a stage gives no summary tokens. It is no
    ``StreamBlock``: each block takes as many summaries as blocks came before it, so that none can be left out, and the
    convolution needs the whole map, so that no token can.
    """

    def __init__(self, config: Config, width: int, heads: int, side: int, *, summaries: int, is_last: bool) -> None:
        super().__init__()
        self.side = side
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = ForwardCrossAttention(width, heads, side, summaries=summaries)
        self.scale1 = nn.Parameter(torch.full((width,), config.layer_scale))
        self.summarize = None if is_last else nn.Conv2d(width, width, 7, 4, padding=3, groups=width, bias=False)
        self.enhance = NormedConv(width, width, 3, groups=width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, approximate="none")
        self.scale2 = nn.Parameter(torch.full((width,), config.layer_scale))

    def forward(self, x: Tensor, summaries: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D), summaries (B, M, D) -> x (B, N, D), and its own summary tokens (B, ceil(S/4)^2, D)."""
        x = x + self.scale1 * self.cross_attention(self.norm1(x), summaries)
        grid = x.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, D, S, S)
        summary = None if self.summarize is None else self.summarize(grid).flatten(2).transpose(1, 2)
        x = self.enhance(grid).flatten(2).transpose(1, 2)
        return x + self.scale2 * self.mlp(self.mlp_norm(self.norm2(x))), summary


class FcaStage(nn.Module):
    """Blocks of attention on maps of one side, each of which reads the summary tokens of those before it."""

    def __init__(self, config: Config, width: int, depth: int, heads: int, side: int) -> None:
        super().__init__()
        self.reach = config.reach
        each = (-(-side // 4)) ** 2  # summary tokens of one block
        self.blocks = nn.ModuleList(
            FcaBlock(config, width, heads, side, summaries=each * min(index, self.reach), is_last=index == depth - 1)
            for index in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        summaries: list[Tensor] = []
        for block in self.blocks:
            x, summary = block(x, torch.cat(summaries[-self.reach :], dim=1) if summaries else None)
            summaries.append(summary)
        return x


class FcaFormer(nn.Module):
    """Classify a picture."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        one, two, three, four = config.widths
        self.side = config.side // 16  # of the third stage's map
        self.stem = Stem(one)
        scale = config.layer_scale
        self.stage1, self.merge1 = ConvStage(one, config.depths[0], layer_scale=scale), PatchMerging(one, two)
        self.stage2, self.merge2 = ConvStage(two, config.depths[1], layer_scale=scale), PatchMerging(two, three)
        self.stage3 = FcaStage(config, three, config.depths[2], config.heads[0], self.side)
        self.merge3 = PatchMerging(three, four)
        self.stage4 = FcaStage(config, four, config.depths[3], config.heads[1], self.side // 2)
        self.norm = nn.LayerNorm(four)
        self.head = nn.Linear(four, config.classes)
        self.initialize()

    def initialize(self) -> None:
        """Linear layers start small, as the authors' do; convolutions start with outputs as large as their inputs."""
        for module in self.modules():
            start_small(module)
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, R, R) -> logits (B, classes)."""
        x = self.merge2(self.stage2(self.merge1(self.stage1(self.stem(image)))))  # (B, D, R/16, R/16)
        x = self.stage3(x.flatten(2).transpose(1, 2))  # (B, N, D)
        x = self.merge3(x.transpose(1, 2).unflatten(2, (self.side, self.side)))  # (B, D', R/32, R/32)
        x = self.stage4(x.flatten(2).transpose(1, 2))  # (B, N/4, D')
        return self.head(self.norm(x.mean(1)))


def build(config: Config) -> FcaFormer:
    """The network at its start."""
    return FcaFormer(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Pictures, their colours brought to mean 0 and deviation 1 as ImageNet's are."""
    batch = Dim(name="batch", low=1, typical=2, high=64)
    return (InputSpec(name="image", role="sample", shape=(batch, 3, config.side, config.side)),)
