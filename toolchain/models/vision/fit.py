"""FIT: layers within groups of tokens, in turns with layers over a few latents of each group that tie all together.

Source: Chen and Li 2023, arXiv:2305.12689; the paper's sizes were not found, so all sizes here are ours. Checked
against google-research/pix2seq at commit eabd4e9 (architectures/transformers.py: FIT, FITDenoiser, FITAR): parameter
counts, order of operations, and outputs with the same weights (equal to 4e-6 of the largest, in float32). Differences:

* All three networks answer with tokens and latents. The release's autoregressive network answers with logits alone;
  the latents here are those that it holds at its end, which it neither norms nor returns.
* Left out: more tokens put before the encoder's, sine and cosine positions, local layers without attention, and cross
  attention without a norm of its source. The denoiser always takes latents of the step before; zeros where there are
  none, as in the release.
* A stage without global layers can only be the last, as in the release. It then leaves the latents as they are.
* Queries, keys and values are one projection, keys and values of cross attention another. Both start as Xavier of the
  whole matrix; the release's start counts heads and their width as axes.

A picture is cut into groups, square parts of it, by :func:`cut`; it is put together again by :func:`join`.

Shapes: B batch, G groups, N tokens of a group, M latents of a group, X width of tokens, L width of latents, K tokens of
a condition, C channels of a token, V vocabulary. Attention costs G*N*N for tokens and G*M*G*M for latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec
from enginewright.models.blocks.transformer import Block, Mlp
from enginewright.passes.traits import CrossAttention


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of one of FIT's networks.

    Args:
        network: what it does; ``autoregressive`` predicts the next token from all before it.
        stages: (local layers, global layers) of each stage; only the last may be without global layers.
        groups: groups that the tokens are cut into.
        tokens: tokens of a group.
        latents: latents of a group.
        width: of tokens.
        latent_width: of latents; the denoiser needs a multiple of 8.
        heads: of attention among tokens.
        latent_heads: of attention among latents; attention across has the smaller number, and the smaller width.
        mlp_ratio: hidden width of an MLP, in widths of its tokens.
        channels: of a token that comes in, and of one that a denoiser gives: those of a patch's pixels.
        condition_tokens: tokens of the denoiser's condition, beside the time.
        condition_width: their width; by default that of one class of ImageNet out of all.
        cross_mlp: whether an MLP follows attention across; the release allows it in the denoiser.
        vocabulary: kinds of tokens of the autoregressive network; by default values of a byte.
    """

    network: Literal["encoder", "denoiser", "autoregressive"]
    stages: tuple[tuple[int, int], ...] = ((2, 4), (2, 4), (2, 4), (2, 0))
    groups: int
    tokens: int
    latents: int
    width: int = 384
    latent_width: int = 512
    heads: int = 8
    latent_heads: int = 8
    mlp_ratio: int = 4
    channels: int = 48
    condition_tokens: int = 1
    condition_width: int = 1000
    cross_mlp: bool = False
    vocabulary: int = 256


def small(network: Literal["encoder", "denoiser", "autoregressive"]) -> Config:
    """The tiny size of one network."""
    return Config(
        network=network,
        stages=((1, 1), (1, 2), (1, 0)),
        groups=4,
        tokens=9,
        latents=3,
        width=32,
        latent_width=48,
        heads=2,
        latent_heads=4,
        channels=12,
        condition_tokens=2,
        condition_width=10,
        vocabulary=32,
    )


# None is published: the release holds no sizes, and the paper's were not found. S is a picture of 64 x 64 in patches of
# 4 x 4, or, for "ar", all its bytes in groups of 8 x 8 x 3. "6400px" takes the paper's 160,000 tokens: patches of 16.
PUBLISHED = {
    "encoder-S": Config(network="encoder", groups=4, tokens=64, latents=16),
    "denoiser-S": Config(network="denoiser", groups=4, tokens=64, latents=16),
    "ar-S": Config(network="autoregressive", groups=64, tokens=192, latents=8),
    "encoder-6400px": Config(network="encoder", groups=400, tokens=400, latents=16, channels=768),
    "encoder-tiny": small("encoder"),
    "ar-tiny": small("autoregressive"),
}
SHIPPED: dict[str, Config] = {}
TINY = small("denoiser")
OUTPUTS = {"encoder": "tokens", "denoiser": "prediction", "autoregressive": "logits"}
"""What each network gives beside latents."""


class Reading(nn.Module, CrossAttention):
    """Attention of tokens to those of a source, in heads whose widths make up ``inner`` or a little less."""

    def __init__(self, width: int, source: int, *, inner: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, inner // heads
        inner = self.heads * self.head_dim
        self.q, self.kv = nn.Linear(width, inner), nn.Linear(source, 2 * inner)
        self.proj = nn.Linear(inner, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x (A, N, D), source (A, N', D') -> (A, N, D)."""
        return self.join_heads(F.scaled_dot_product_attention(*self.heads_of(x, source)))


class CrossBlock(nn.Module):
    """Let tokens read those of a source; both are normed. An MLP may follow.

    Stages hold these by name, not in a list: each ties two kinds of tokens together, and none can be left out.
    """

    def __init__(self, width: int, source: int, *, inner: int, heads: int, mlp_hidden: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm_source = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(source, eps=1e-6)
        self.attn = Reading(width, source, inner=inner, heads=heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6) if mlp_hidden else None
        self.mlp = Mlp(width, mlp_hidden, approximate="none") if mlp_hidden else None

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x (A, N, D), source (A, N', D') -> (A, N, D)."""
        x = x + self.attn(self.norm1(x), self.norm_source(source))
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.mlp(self.norm2(x))
        return x


def blocks(count: int, width: int, heads: int, mlp_ratio: int) -> nn.ModuleList:
    """``count`` blocks of one width."""
    return nn.ModuleList(Block(width, heads, mlp_ratio, eps=1e-6) for _ in range(count))


class Stage(nn.Module):
    """Local layers; latents read their group, then the condition; global layers; tokens read their group's latents."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        local_count, global_count = config.stages[index]
        is_last = index == len(config.stages) - 1
        assert global_count or is_last, "only the last stage may be without global layers"
        width, latent_width, ratio = config.width, config.latent_width, config.mlp_ratio
        heads, inner = min(config.heads, config.latent_heads), min(width, latent_width)
        hidden = ratio if config.cross_mlp else 0
        self.groups, self.is_causal = config.groups, config.network == "autoregressive"
        self.local_blocks = blocks(local_count, width, config.heads, ratio)
        self.global_blocks = blocks(global_count, latent_width, config.latent_heads, ratio)
        self.read = self.read_condition = self.write = None
        if global_count:
            self.read = CrossBlock(latent_width, width, inner=inner, heads=heads, mlp_hidden=hidden * latent_width)
        if global_count and config.network == "denoiser":
            self.read_condition = CrossBlock(latent_width, latent_width, inner=latent_width, heads=config.latent_heads)
        if not is_last:
            self.write = CrossBlock(width, latent_width, inner=inner, heads=heads, mlp_hidden=hidden * width)

    def heard(self, latents: Tensor) -> Tensor:
        """The latents that each group reads, from those of all groups (B*G, M, L) -> (B*G, M, L).

        Where the future is hidden, a group reads those of the group before it, and the first one zeros: its own know
        all its tokens.
        """
        if not self.is_causal:
            return latents
        before = latents.unflatten(0, (-1, self.groups))[:, :-1]  # (B, G-1, M, L)
        return F.pad(before, (0, 0, 0, 0, 1, 0)).flatten(0, 1)

    def forward(
        self, x: Tensor, latents: Tensor, condition: Tensor | None, mask: Tensor | None, latent_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run one stage.

        Args:
            x: (B*G, N, X) the tokens of each group.
            latents: (B*G, M, L).
            condition: (B, 1+K, L) the time and the condition, for a denoiser.
            mask: (N, N) true where a token sees another of its group; None: everywhere.
            latent_mask: (G*M, G*M) likewise for latents.

        Returns:
            Tokens and latents as they came.
        """
        for block in self.local_blocks:
            x = block(x, mask)
        if self.read is None:
            return x, latents
        per_group = latents.shape[1]
        latents = self.read(latents, x).unflatten(0, (-1, self.groups)).flatten(1, 2)  # (B, G*M, L)
        if self.read_condition is not None:
            latents = self.read_condition(latents, condition)
        for block in self.global_blocks:
            latents = block(latents, latent_mask)
        latents = latents.unflatten(1, (self.groups, per_group)).flatten(0, 1)  # (B*G, M, L)
        if self.write is not None:
            x = self.write(x, self.heard(latents))
        return x, latents


class Interleaved(nn.Module):
    """All stages, in order."""

    mask: Tensor | None
    latent_mask: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.groups = config.groups
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.stages)))
        mask = latent_mask = None
        if config.network == "autoregressive":
            mask = torch.ones(config.tokens, config.tokens, dtype=torch.bool).tril()
            group = torch.arange(config.groups).repeat_interleave(config.latents)
            latent_mask = group[:, None] >= group
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("latent_mask", latent_mask, persistent=False)

    def forward(self, x: Tensor, latents: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, G, N, X), latents (B, G, M, L), condition (B, 1+K, L) -> tokens and latents, as they came."""
        x, latents = x.flatten(0, 1), latents.flatten(0, 1)
        for stage in self.stages:
            x, latents = stage(x, latents, condition, self.mask, self.latent_mask)
        return x.unflatten(0, (-1, self.groups)), latents.unflatten(0, (-1, self.groups))


def start(network: nn.Module) -> None:
    """The authors' start: Xavier linears without offsets, and tables normal with a deviation of 0.02."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for table in network.parameters(recurse=False):
        nn.init.trunc_normal_(table, std=0.02)


class Encoder(nn.Module):
    """Encode patches as tokens and latents, both normed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Linear(config.channels, config.width), nn.LayerNorm(config.width, eps=1e-6)
        self.place = nn.Parameter(torch.empty(config.tokens, config.width))
        self.latents = nn.Parameter(torch.empty(config.groups, config.latents, config.latent_width))
        self.trunk = Interleaved(config)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.latent_norm = nn.LayerNorm(config.latent_width, eps=1e-6)
        start(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, G, N, C) -> tokens (B, G, N, X), latents (B, G, M, L)."""
        latents = self.latents.repeat(x.shape[0], 1, 1, 1)
        tokens, latents = self.trunk(self.stem_norm(self.stem(x)) + self.place, latents)
        return self.norm(tokens), self.latent_norm(latents)


class TimeEmbedding(nn.Module):
    """Sines and cosines of a thousand times the time, scaled to zero mean and unit deviation, then two linears."""

    rates: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        assert width % 8 == 0, "the width must be a multiple of 8"
        count = width // 8  # of sines, and of cosines
        self.mlp = nn.Sequential(nn.Linear(2 * count, width), nn.SiLU(), nn.Linear(width, width))
        rates = 1000 * torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float64) / count)
        self.register_buffer("rates", rates.float(), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """Time (B,) from 0 to 1 -> (B, L)."""
        angle = time.float()[:, None] * self.rates
        code = torch.cat([angle.sin(), angle.cos()], dim=1)  # in float32: half precision has no angle of 1000
        code = code - code.mean(1, keepdim=True)
        code = code * torch.rsqrt(code.square().mean(1, keepdim=True))
        return self.mlp(code.to(next(self.mlp.parameters()).dtype))


class Denoiser(nn.Module):
    """Predict what the noise hides in patches; latents go from one step of a sampler to the next."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, latent_width = config.width, config.latent_width
        self.stem, self.stem_norm = nn.Linear(config.channels, width), nn.LayerNorm(width, eps=1e-6)
        self.place = nn.Parameter(torch.empty(config.tokens, width))
        self.latents = nn.Parameter(torch.empty(config.groups, config.latents, latent_width))
        self.time = TimeEmbedding(latent_width)
        self.condition = nn.Linear(config.condition_width, latent_width)
        self.previous_norm1 = nn.LayerNorm(latent_width, eps=1e-6)
        self.previous_mlp = Mlp(latent_width, config.mlp_ratio * latent_width, approximate="none")
        self.previous_norm2 = nn.LayerNorm(latent_width, eps=1e-6)
        self.trunk = Interleaved(config)
        self.norm, self.out = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, config.channels)
        start(self)
        nn.init.zeros_(self.previous_norm2.weight)  # at the start the latents of the step before say nothing

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Predict one step.

        Args:
            x: (B, G, N, C) noisy patches.
            time: (B,) from 0 to 1.
            condition: (B, K, condition_width).
            previous: (B, G, M, L) the latents that the last call gave; zeros for the first.

        Returns:
            The prediction (B, G, N, C), and the latents (B, G, M, L), which are not normed.
        """
        previous = previous + self.previous_mlp(self.previous_norm1(previous))
        latents = self.latents + self.previous_norm2(previous)
        told = torch.cat([self.time(time)[:, None], self.condition(condition)], dim=1)  # (B, 1+K, L)
        tokens, latents = self.trunk(self.stem_norm(self.stem(x)) + self.place, latents, told)
        return self.out(self.norm(tokens)), latents


class Autoregressive(nn.Module):
    """Predict at each token the next one, from it and those before it in its group, and from the groups before."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.vocabulary, config.width))
        self.bias = nn.Parameter(torch.empty(config.vocabulary))
        self.place = nn.Parameter(torch.empty(config.tokens, config.width))
        self.latents = nn.Parameter(torch.empty(config.groups, config.latents, config.latent_width))
        self.trunk = Interleaved(config)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        start(self)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, G, N) -> logits of the next token (B, G, N, V), latents (B, G, M, L), which are not normed."""
        latents = self.latents.repeat(ids.shape[0], 1, 1, 1)
        x, latents = self.trunk(F.embedding(ids, self.embedding) + self.place, latents)
        return F.linear(self.norm(x), self.embedding, self.bias), latents


def cut(image: Tensor, *, groups: int, patch: int) -> Tensor:
    """Cut a picture (B, c, S, S) into square groups of square patches, each row by row -> (B, G, N, patch*patch*c)."""
    rows = math.isqrt(groups)
    assert rows * rows == groups, "a square picture has a square number of groups"
    side = image.shape[3] // (rows * patch)  # of a group, in patches
    parts = image.unflatten(3, (rows, side, patch)).unflatten(2, (rows, side, patch))  # (B, c, gy, y, py, gx, x, px)
    return parts.permute(0, 2, 5, 3, 6, 4, 7, 1).flatten(5, 7).flatten(3, 4).flatten(1, 2)


def join(tokens: Tensor, *, patch: int) -> Tensor:
    """Put the picture (B, c, S, S) together again that :func:`cut` has cut into tokens (B, G, N, patch*patch*c)."""
    rows, side = math.isqrt(tokens.shape[1]), math.isqrt(tokens.shape[2])
    parts = tokens.unflatten(3, (patch, patch, -1)).unflatten(2, (side, side)).unflatten(1, (rows, rows))
    return parts.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5, 7).flatten(2, 4)  # parts: (B, gy, gx, y, x, py, px, c)


NETWORKS: dict[str, type[Encoder | Denoiser | Autoregressive]] = {
    "encoder": Encoder,
    "denoiser": Denoiser,
    "autoregressive": Autoregressive,
}


def build(config: Config) -> Encoder | Denoiser | Autoregressive:
    """The network that the size names, with the authors' start."""
    return NETWORKS[config.network](config)


def outputs(config: Config) -> tuple[str, ...]:
    """Names of what a network gives."""
    return OUTPUTS[config.network], "latents"


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Patches or ids by group; for the denoiser also the time, a condition, and the latents of the step before."""
    is_long = config.groups * config.tokens > 2**16
    batch = Dim(name="batch", low=1, typical=1 if is_long else 2, high=1 if is_long else 16)
    groups = (batch, config.groups)
    if config.network == "autoregressive":
        return (
            InputSpec(
                name="ids", role="sample", shape=(*groups, config.tokens), dtype="int64", low=0, high=config.vocabulary
            ),
        )
    x = InputSpec(name="x", role="sample", shape=(*groups, config.tokens, config.channels))
    if config.network == "encoder":
        return (x,)
    return (
        x,
        InputSpec(name="time", role="timestep", shape=(batch,), low=0, high=1),
        InputSpec(name="condition", role="condition", shape=(batch, config.condition_tokens, config.condition_width)),
        InputSpec(name="previous", role="state", shape=(*groups, config.latents, config.latent_width)),
    )
