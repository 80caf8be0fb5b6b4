"""DRSformer: take rain off a picture by attention among channels, in which only the largest scores of a row count.

Source: Chen et al. 2023, arXiv:2303.11950, section 3. Checked against cschenxiang/DRSformer at commit e77bbb4:
parameter counts, order of operations, and outputs with the same weights (equal to 3e-13 where all is float64). What
differs:

* The four sparse attentions are one matrix: their softmaxes are blended by the learned weights first, and multiply the
  values once, not four times. What stays is what is no less than the K-th largest score of its row; one sorted list
  tells that for every K. The release sorts four times and writes masks. Scores that tie at a threshold all stay.
* Queries and keys are divided by their lengths after their product: C/H x C/H scores are, not two whole maps. Lengths,
  scores and choice are in float32 whatever the rest is in: half precision overflows on sums over a picture, and ties.
* The outputs of the experts are scaled in one product, not each on its own. Of the ReLUs after them, the one that never
  meets a negative number is left out: a step adds what a ReLU gave to what another did.
* The four weights of the blend are one parameter.

Shapes: B batch; a map has C channels, Y rows and X columns, P = Y*X places; H heads, d = C/H; E = 8 experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec
from enginewright.sources.contract import Published


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of DRSformer: a U of four levels, each of half the side and twice the width of the one above.

    Args:
        width: channels of the first level.
        blocks: of each level, on the way down and, but for the last, on the way up again.
        heads: attention heads of each level.
        expansion: hidden width of a feed-forward, in widths of its level; rounded down.
        steps: rounds of the mixtures of experts at both ends of the U; 0: there are none.
        sides: smallest, typical and largest side of a picture, all multiples of 8.
    """

    width: int = 48
    blocks: tuple[int, int, int, int] = (4, 6, 6, 8)
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    expansion: float = 2.66
    steps: int = 4
    sides: tuple[int, int, int] = (64, 256, 1024)


PUBLISHED = {
    "full": Config(),
    "without-experts": Config(steps=0),  # of Rain200L and SPA-Data, whose rain is simpler
}
SHIPPED: dict[str, Config] = {}
TINY = Config(width=10, blocks=(0, 1, 0, 0), steps=1, sides=(16, 32, 64))  # quick to trace at any side
OUTPUTS = ("derained",)
FIGURES = {
    "full": (
        # Of a public list of networks for deraining, from memory. Its products, of a picture of 256 x 256, are those of
        # the release, which multiplies the values four times; once, as here, they are 229.4 G.
        Published(figure="parameter_count", value="33.66 M", source="a public list, from memory"),
        Published(figure="macs", value="243.0 G", source="a public list, from memory"),
    )
}
KEPT = ((1, 2), (2, 3), (3, 4), (4, 5))
"""The shares of a row of scores that the four sparse attentions keep, as fractions; rounded down."""


class ChannelNorm(nn.LayerNorm):
    """Normalise the channels of each place."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, Y, X) -> (B, C, Y, X)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv(inside: int, outside: int, kernel: int, *, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the sides of a map."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inside, outside, kernel, padding=padding, dilation=dilation, groups=groups, bias=False)


class SparseChannelAttention(nn.Module):
    """Attention among a head's channels over all places, blended from four that keep a different share of each row."""

    ranks: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        channels = width // heads
        self.qkv = conv(width, 3 * width, 1)
        self.qkv_depthwise = conv(3 * width, 3 * width, 3, groups=3 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.blend = nn.Parameter(torch.full((len(KEPT),), 0.2))
        self.out = conv(width, width, 1)
        self.kept = tuple(channels * part // whole for part, whole in KEPT)  # ascending
        self.register_buffer("ranks", torch.tensor(self.kept) - 1, persistent=False)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Cosines of channels, times the temperature: q and k (B, H, d, P) -> (B, H, d, d) in float32."""
        q, k = q.float(), k.float()
        lengths = [x.norm(dim=3, keepdim=True).clamp(min=1e-12) for x in (q, k)]  # each (B, H, d, 1)
        return q @ k.mT / (lengths[0] * lengths[1].mT) * self.temperature

    def weights(self, scores: Tensor) -> Tensor:
        """Blend the softmaxes over the K largest scores of a row, for each K: (B, H, d, d) -> (B, H, d, d)."""
        least = scores.topk(self.kept[-1], dim=3).values.index_select(3, self.ranks)  # (B, H, d, 4)
        rows = scores[..., None, :]  # (B, H, d, 1, d)
        sparse = rows.masked_fill(rows < least[..., None], -torch.inf).softmax(4)  # (B, H, d, 4, d)
        return (self.blend[:, None] * sparse).sum(3)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, Y, X) -> (B, C, Y, X)."""
        qkv = self.qkv_depthwise(self.qkv(x)).flatten(2)  # (B, 3C, P)
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in qkv.chunk(3, dim=1))  # each (B, H, d, P)
        y = self.weights(self.scores(q, k)).to(v.dtype) @ v  # (B, H, d, P)
        return self.out(y.flatten(1, 2).unflatten(2, x.shape[2:]))


class MixedScaleFeedForward(nn.Module):
    """Two convolutions of each channel, of 3x3 and 5x5, that exchange halves between their two layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.project_in = conv(width, 2 * hidden, 1)
        self.first3 = conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden)
        self.first5 = conv(2 * hidden, 2 * hidden, 5, groups=2 * hidden)
        self.second3 = conv(2 * hidden, hidden, 3, groups=hidden)
        self.second5 = conv(2 * hidden, hidden, 5, groups=hidden)
        self.project_out = conv(2 * hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, Y, X) -> (B, C, Y, X)."""
        x = self.project_in(x)
        halves3 = F.relu(self.first3(x)).chunk(2, dim=1)  # each (B, hidden, Y, X)
        halves5 = F.relu(self.first5(x)).chunk(2, dim=1)
        y3 = F.relu(self.second3(torch.cat([halves3[0], halves5[0]], dim=1)))  # (B, hidden, Y, X)
        y5 = F.relu(self.second5(torch.cat([halves3[1], halves5[1]], dim=1)))
        return self.project_out(torch.cat([y3, y5], dim=1))


class Block(nn.Module):
    """Sparse attention and a feed-forward of two scales, each normed first and added."""

    def __init__(self, width: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(width)
        self.attention = SparseChannelAttention(width, heads)
        self.norm2 = ChannelNorm(width)
        self.feed_forward = MixedScaleFeedForward(width, int(width * expansion))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, Y, X) -> (B, C, Y, X)."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Separable(nn.Sequential):
    """Twice a convolution of each channel, then one of each place; a ReLU between the two rounds."""

    def __init__(self, width: int, kernel: int) -> None:
        each = [(conv(width, width, kernel, groups=width), conv(width, width, 1)) for _ in range(2)]
        super().__init__(*each[0], nn.ReLU(), *each[1])


class Dilated(nn.Sequential):
    """A convolution of each channel over every other place, then one of each place."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(conv(width, width, kernel, groups=width, dilation=2), conv(width, width, 1))


class ExpertStep(nn.Module):
    """Eight small networks side by side, each scaled, then joined and added to what they read."""

    EXPERTS = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        separable, dilated = (Separable(width, k) for k in (1, 3, 5, 7)), (Dilated(width, k) for k in (3, 5, 7))
        self.experts = nn.ModuleList([*separable, *dilated, nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)])
        self.join = conv(self.EXPERTS * width, width, 1)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (B, C, Y, X), of which no value is negative, and weights (B, E) -> (B, C, Y, X), likewise."""
        found = torch.cat([expert(x) for expert in self.experts], dim=1)  # (B, E*C, Y, X)
        scale = weights[:, :, None].expand(-1, -1, x.shape[1]).flatten(1)[..., None, None]  # (B, E*C, 1, 1)
        return F.relu(self.join(scale * found)) + x


class MixtureOfExperts(nn.Module):
    """Steps of eight experts, all of which run; how much each counts follows from the means of the channels."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        count = steps * ExpertStep.EXPERTS
        self.router = nn.Sequential(nn.Linear(width, 2 * count), nn.ReLU(), nn.Linear(2 * count, count))
        self.project_in = conv(width, width, 1)
        self.steps = nn.ModuleList(ExpertStep(width) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, Y, X) -> (B, C, Y, X)."""
        means = x.float().mean((2, 3)).to(x.dtype)  # in float32: half precision cannot sum a picture
        weights = self.router(means).unflatten(1, (-1, ExpertStep.EXPERTS)).softmax(2)  # (B, steps, E)
        x = F.relu(self.project_in(x))
        for index, step in enumerate(self.steps):
            x = step(x, weights[:, index])
        return x


def halve(width: int) -> nn.Sequential:
    """Halve a map's sides and double its channels: (B, C, Y, X) -> (B, 2C, Y/2, X/2)."""
    return nn.Sequential(conv(width, width // 2, 3), nn.PixelUnshuffle(2))


def double(width: int) -> nn.Sequential:
    """Double a map's sides and halve its channels: (B, C, Y, X) -> (B, C/2, 2Y, 2X)."""
    return nn.Sequential(conv(width, 2 * width, 3), nn.PixelShuffle(2))


class DRSformer(nn.Module):
    """Add to a rainy picture what makes it a clear one."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        one, two, three, four = (config.width * 2**level for level in range(4))
        self.embed = conv(3, one, 3)
        self.experts_in = MixtureOfExperts(one, config.steps) if config.steps else nn.Identity()
        self.down1, self.halve1 = self.level(config, 0, one), halve(one)
        self.down2, self.halve2 = self.level(config, 1, two), halve(two)
        self.down3, self.halve3 = self.level(config, 2, three), halve(three)
        self.bottom = self.level(config, 3, four)
        self.double3, self.reduce3, self.up3 = double(four), conv(four, three, 1), self.level(config, 2, three)
        self.double2, self.reduce2, self.up2 = double(three), conv(three, two, 1), self.level(config, 1, two)
        self.double1, self.up1 = double(two), self.level(config, 0, two)  # not reduced: twice the width of down1
        self.experts_out = MixtureOfExperts(two, config.steps) if config.steps else nn.Identity()
        self.output = conv(two, 3, 3)

    @staticmethod
    def level(config: Config, index: int, width: int) -> nn.Sequential:
        """The blocks of one level, on one way."""
        blocks = (Block(width, config.heads[index], config.expansion) for _ in range(config.blocks[index]))
        return nn.Sequential(*blocks)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, Y, X) -> (B, 3, Y, X), not clamped; Y and X are multiples of 8."""
        one = self.down1(self.experts_in(self.embed(image)))  # (B, C, Y, X)
        two = self.down2(self.halve1(one))  # (B, 2C, Y/2, X/2)
        three = self.down3(self.halve2(two))  # (B, 4C, Y/4, X/4)
        x = self.double3(self.bottom(self.halve3(three)))  # (B, 4C, Y/4, X/4)
        x = self.double2(self.up3(self.reduce3(torch.cat([x, three], dim=1))))  # (B, 2C, Y/2, X/2)
        x = self.double1(self.up2(self.reduce2(torch.cat([x, two], dim=1))))  # (B, C, Y, X)
        x = self.experts_out(self.up1(torch.cat([x, one], dim=1)))  # (B, 2C, Y, X)
        return self.output(x) + image


def build(config: Config) -> DRSformer:
    """The network with the authors' start, which is PyTorch's."""
    return DRSformer(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Rainy pictures with colours from 0 to 1."""
    low, typical, high = config.sides
    batch = Dim(name="batch", low=1, typical=1, high=4)
    height, width = (Dim(name=name, low=low, typical=typical, high=high, multiple_of=8) for name in ("height", "width"))
    return (InputSpec(name="image", role="sample", shape=(batch, 3, height, width), low=0, high=1),)
