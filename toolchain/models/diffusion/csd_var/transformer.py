"""Switti's transformer with CSD-VAR's memories: it draws a picture's codes scale after scale, a whole scale in a call.

Source: Nguyen et al. 2025, arXiv:2507.13984 (CSD-VAR), upon Switti, Voronov et al. 2024, arXiv:2412.01819. Checked
against yandex-research/switti at 3b286b5 and visual-ar-group/CSD-VAR at 37507e7: parameter counts, order of operations,
and outputs with the same weights at a tiny size, with and without memories. Attribute names are those of a released
checkpoint, but for ``memory`` (their ``virtual_token_embed``, of whose ten rows two are used) and for buffers. What
differs:

* ``step`` is for deployment, and what is exported: keys and values of earlier scales lie in a cache of fixed length,
  the program's state, and one engine takes a scale of any number of tokens. ``forward`` reads all scales at once.
* Angles of the rotary positions are constants, not complex numbers. Those of the crop's sizes are taken less whole
  turns, because the sine of an angle of thousands of turns is not the same everywhere in float32.
* Layers start so that values keep their size. The authors' gates start at 1e-5 of the other weights, and their head at
  a fiftieth, which would silence a network with random weights.

Shapes: B batch, N tokens of all scales, L of one, T of text, V codes, D width, H heads, E width of a head, M slots of
the cache, Z blocks, S scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.models.blocks.decoding import with_cache
from enginewright.models.blocks.llama import Angles, GatedMlp, RMSNorm
from enginewright.models.diffusion.csd_var.scales import FROM_CONTENT, SCALES_512, SCALES_1024, scale_of_slots, starts
from enginewright.passes.traits import StreamBlock
from enginewright.validation.inputs import draw

Memories = Literal["none", "apart", "kept", "released", "style", "content"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of the transformer.

    Args:
        depth: blocks.
        width: of a token.
        heads: of attention.
        codes: entries of the codebook.
        channels: of a code.
        scales: sides of the token maps; the first is 1.
        context: width of the text's tokens.
        pooled: width of the text as a whole.
        text: tokens of text.
        sees_earlier: whether a scale attends to those before it (Switti-AR), or to itself alone (Switti).
        memories: how often a scale sees the style's memory and the content's, which are put before the style's and
            the content's first scale. ``none``: not at all. ``apart``: the style's before the content's first scale,
            the content's from there on; that is the mask for tuning a base that sees one scale alone. ``kept``: the
            style's goes on to be seen; that is their mask for tuning Switti-AR. ``released``: both from the start, and
            both twice from the content's first scale on: what their drawing does, which puts both in at either scale.
            ``style`` and ``content``: the one alone, as their drawing does in its modes of these names.
    """

    depth: int
    width: int
    heads: int
    codes: int = 4096
    channels: int = 32
    scales: tuple[int, ...] = SCALES_512
    context: int = 2048
    pooled: int = 1280
    text: int = 77
    sees_earlier: bool = True
    memories: Memories = "none"

    @property
    def tokens(self) -> int:
        """Tokens of all scales."""
        return starts(self.scales)[-1]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


PUBLISHED = {
    "csd-var": Config(depth=30, width=1920, heads=30, memories="kept"),
    "switti-ar": Config(depth=30, width=1920, heads=30),
    "switti": Config(depth=30, width=1920, heads=30, sees_earlier=False),
    "switti-1024": Config(depth=30, width=1920, heads=30, sees_earlier=False, scales=SCALES_1024),
    "depth-16": Config(depth=16, width=1024, heads=16, memories="kept"),  # what the authors' class is without arguments
}
TINY = Config(
    depth=2, width=32, heads=2, codes=64, channels=8, scales=(1, 2, 3, 4, 5), context=24, pooled=16, text=7,
    memories="kept",
)  # fmt: skip
SHIPPED: dict[str, Config] = {}
OUTPUTS = ("logits",)
JOB_NEEDS_TRAINING = False
"""Whether calls like those in use say nothing of random weights: a run goes through its scales with any."""


def axial_angles(config: Config, *, base: float = 10000.0, extent: float = 128.0) -> Angles:
    """Cosines and sines of each token's place in its map: each (N, E/2), columns first, then rows.

    Places of every scale are spread over the same extent.
    """
    rate = base ** -(torch.arange(0, config.head_dim, 4, dtype=torch.float64) / config.head_dim)  # (E/4,)
    found = []
    for side in config.scales:
        place = torch.arange(side, dtype=torch.float64) * extent / max(side - 1, 1)
        rows, columns = torch.meshgrid(place, place, indexing="ij")
        found.append(torch.cat([columns.reshape(-1, 1) * rate, rows.reshape(-1, 1) * rate], dim=1))  # (side^2, E/2)
    angles = torch.cat(found)
    return angles.cos().float(), angles.sin().float()


def turn(x: Tensor, angles: Angles) -> Tensor:
    """Turn each pair of neighbouring features of x (B, H, L, E) by its angle, (L, E/2)."""
    cos, sin = angles
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (B, H, L, E/2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).to(x.dtype)


def times_seen(config: Config) -> Tensor:
    """How often each token sees the style's memory and the content's: (N, 2)."""
    scale = scale_of_slots(config.scales)
    early, late, always = scale < FROM_CONTENT, scale >= FROM_CONTENT, scale >= 0
    first, at_content = scale == 0, scale == FROM_CONTENT
    none = ~always
    style, content, both, again = always, late, always, late
    if not config.sees_earlier:  # what was put in at a scale is seen there alone
        style, content, both, again = first, at_content, first | at_content, none
    seen = {
        "none": (none, none),
        "apart": (early, late),
        "kept": (always if config.sees_earlier else early, late),
        "released": (both.long() + again, both.long() + again),
        "style": (style, none),
        "content": (none, content),
    }[config.memories]
    return torch.stack([each.float() for each in seen], dim=1)


Source = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values, each (B or 1, H, K, E), and what is added to their scores, broadcastable to (B, H, L, K)."""


def attend(q: Tensor, sources: list[Source]) -> Tensor:
    """Queries (B, H, L, E) over keys of several sources, which are read and never copied -> (B, H, L, E)."""
    scores = []
    for keys, _, bias in sources:
        found = (q * q.shape[-1] ** -0.5) @ keys.to(q.dtype).mT  # (B, H, L, K)
        scores.append(found if bias is None else found + bias)
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(q.dtype)
    y, begin = torch.zeros_like(q), 0
    for keys, values, _ in sources[:-1]:
        y = y + weights[..., begin : begin + keys.shape[2]] @ values.to(q.dtype)
        begin += keys.shape[2]
    return y + weights[..., begin:] @ sources[-1][1].to(q.dtype)


def hiding(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key is seen, else minus infinity."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


class Normed(nn.Module):
    """Both attentions' norm of queries and keys, over all heads at once and without weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.k_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.proj = nn.Linear(width, width)

    def part(self, x: Tensor) -> Tensor:
        """X (B, L, D) -> (B, H, L, E)."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def join(self, y: Tensor) -> Tensor:
        """Y (B, H, L, E) -> (B, L, D)."""
        return self.proj(y.transpose(1, 2).flatten(2))


class SelfAttention(Normed):
    """Attention to tokens of the same scale and of earlier ones, with rotary places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.to_qkv = nn.Linear(width, 3 * width)

    def forward(
        self, x: Tensor, angles: Angles, others: list[Source], own: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to other sources and to x itself.

        Args:
            x: (B, L, D).
            angles: of its places.
            others: keys that are there beside those of x: memories, and a cache.
            own: what is added to the scores of x's own keys; None: all are seen.

        Returns:
            The output (B, L, D), and the keys and values of x (B, H, L, E).
        """
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q, k = (turn(self.part(norm(each)), angles) for norm, each in ((self.q_norm, q), (self.k_norm, k)))
        v = self.part(v)
        return self.join(attend(q, [*others, (k, v, own)])), k, v


class CrossAttention(Normed):
    """Attention to the text."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__(width, heads)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(context, 2 * width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D), context (B, T, C), mask (B, 1, 1, T), true where a token is none of padding -> (B, L, D)."""
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = self.part(self.q_norm(self.to_q(x))), self.part(self.k_norm(k)), self.part(v)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@dataclass
class Given:
    """What all blocks of one call read beside the tokens.

    Args:
        condition: the text as a whole (B, D).
        crop: the picture's sizes (B, D).
        context: the text's tokens (B, T, C).
        mask: (B, 1, 1, T), true where they are none of padding.
        angles: of the tokens' places, each (L, E/2).
        own: what is added to the scores of the tokens' own keys; None: all see all.
    """

    condition: Tensor
    crop: Tensor
    context: Tensor
    mask: Tensor
    angles: Angles
    own: Tensor | None = None


class Block(nn.Module, StreamBlock):
    """Self-attention, attention to the text, and a gated feed-forward, each between two norms and beside a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width, config.heads)
        self.cross_attn = CrossAttention(width, config.heads, config.context)
        self.ffn = GatedMlp(width, int(width * 8 / 3))
        self.self_attention_norm1, self.self_attention_norm2 = RMSNorm(width), RMSNorm(width)
        self.cross_attention_norm1, self.cross_attention_norm2 = RMSNorm(width), RMSNorm(width)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(width), RMSNorm(width)
        self.attention_y_norm = RMSNorm(config.context)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.crop_cond_scales = nn.Parameter(torch.zeros(1, width))

    def forward(self, x: Tensor, given: Given, others: list[Source]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D), and keys that are there beside its own -> x (B, L, D), its keys and values (B, H, L, E)."""
        modulation = self.ada_lin(given.condition + self.crop_cond_scales * given.crop)[:, None]  # (B, 1, 6D)
        gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = modulation.chunk(6, dim=-1)
        y = self.self_attention_norm1(x) * (1 + scale_a) + shift_a
        y, keys, values = self.attn(y, given.angles, others, given.own)
        x = x + gate_a * self.self_attention_norm2(y)
        y = self.cross_attn(self.cross_attention_norm1(x), self.attention_y_norm(given.context), given.mask)
        x = x + self.cross_attention_norm2(y)
        y = self.ffn(self.ffn_norm1(x) * (1 + scale_f) + shift_f)
        return x + gate_f * self.ffn_norm2(y), keys, values


class FourierFeatures(nn.Module):
    """Sines and cosines of numbers times fixed random rates, in turns."""

    def __init__(self, rates: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rates), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Numbers (B, n) -> (B, 2 * n * rates), for each number all sines, then all cosines."""
        turns = x[..., None] * self.weight
        angle = 2 * math.pi * (turns - turns.floor())  # (B, n, rates)
        return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1).to(self.weight.dtype)


class HeadNorm(nn.Module):
    """The norm before the head, with scale and shift from the text as a whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, L, D), condition (B, D) -> (B, L, D)."""
        scale, shift = self.ada_lin(condition)[:, None].chunk(2, dim=-1)
        return self.ln_wo_grad(x) * (1 + scale) + shift


class Transformer(nn.Module):
    """Predict the codes of a scale from the picture so far, at that scale's resolution, and from text."""

    scale: Tensor
    cos: Tensor
    sin: Tensor
    seen: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.word_embed = nn.Linear(config.channels, width)
        self.text_pooler = nn.Linear(config.pooled, width)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.lvl_embed = nn.Embedding(len(config.scales), width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.crop_embed = FourierFeatures(width // 8)
        self.crop_proj = nn.Linear(width, width)
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, config.codes)
        if config.memories != "none":  # key and value of the style's memory, then of the content's
            self.memory = nn.Parameter(torch.zeros(2, 2, width))
        cos, sin = axial_angles(config)
        for name, table in (
            ("scale", scale_of_slots(config.scales)),
            ("cos", cos),
            ("sin", sin),
            ("seen", times_seen(config).log()),
        ):
            self.register_buffer(name, table, persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """Start layers so that values keep their size; tables and memories as the authors' (memories by Xavier)."""
        std = (3 * self.config.width) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=std)
        nn.init.trunc_normal_(self.pos_start, std=std)
        if self.config.memories != "none":
            bound = (6 / (3 * self.config.tokens + self.config.width)) ** 0.5
            nn.init.uniform_(self.memory, -bound, bound)

    def embed(self, features: Tensor, slots: Tensor, condition: Tensor) -> Tensor:
        """Features (B, L, channels) and condition (B, D) -> tokens (B, L, D); the first token of all is the text's."""
        x = torch.where((slots == 0)[:, None], condition[:, None] + self.pos_start, self.word_embed(features))
        return x + self.lvl_embed(self.scale[slots])

    def given(self, slots: Tensor, pooled: Tensor, crop: Tensor, context: Tensor, mask: Tensor) -> Given:
        """What all blocks read, for tokens at some slots (L,)."""
        return Given(
            condition=self.text_pooler(pooled),
            crop=self.crop_proj(self.crop_embed(crop)),
            context=context,
            mask=mask[:, None, None],
            angles=(self.cos[slots], self.sin[slots]),
        )

    def memories(self, slots: Tensor) -> list[Source]:
        """The first block's memories as keys and values, seen as often as the scale says; none where there are none.

        A key that is seen n times is one whose score is greater by log n.
        """
        if self.config.memories == "none":
            return []
        parted = self.memory.unflatten(-1, (self.config.heads, -1)).permute(1, 2, 0, 3)  # (2, H, 2, E)
        # A copy: a view of a parameter asks for gradients even where none are wanted.
        keys, values = parted.contiguous()[:, None].unbind(0)
        return [(keys, values, self.seen[slots])]

    def forward(self, features: Tensor, pooled: Tensor, crop: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Read all scales at once, as in training.

        Args:
            features: (B, N, channels), the picture so far at each scale's resolution; the first is not read.
            pooled: (B, P).
            crop: height and width of the picture, and what was cut from its top and left: (B, 4).
            context: (B, T, C).
            mask: (B, T), true where a token of text is none of padding.

        Returns:
            Logits (B, N, V).
        """
        slots = torch.arange(features.shape[1], device=features.device)
        given = self.given(slots, pooled, crop, context, mask)
        own, other = self.scale[slots][:, None], self.scale[slots]
        given.own = hiding(other <= own if self.config.sees_earlier else other == own, features.dtype)  # (N, N)
        x = self.embed(features, slots, given.condition)
        for index, block in enumerate(self.blocks):
            x, _, _ = block(x, given, self.memories(slots) if index == 0 else [])
        return self.head(self.head_nm(x, given.condition))

    def step(
        self,
        features: Tensor,
        position: Tensor,
        pooled: Tensor,
        crop: Tensor,
        context: Tensor,
        mask: Tensor,
        cache: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read one scale, where earlier scales' keys and values are cached.

        Args:
            features: (B, L, channels), all tokens of the scale.
            position: the slot of the first of them, int64 ().
            pooled: as in ``forward``, and so are ``crop``, ``context`` and ``mask``.
            crop: see there.
            context: see there; another than before where the scale is of another kind.
            mask: see there.
            cache: keys and values, each (B, Z, H, M, E); what lies at ``position`` and beyond is not read. None:
                a scale attends to itself alone.

        Returns:
            Logits (B, L, V), and keys and values of these tokens, each (B, Z, H, L, E).
        """
        slots = position + torch.arange(features.shape[1], device=features.device)
        given = self.given(slots, pooled, crop, context, mask)
        earlier: list[list[Source]] = [[] for _ in self.blocks]
        if cache is not None:
            before = hiding(torch.arange(cache[0].shape[3], device=features.device) < position, features.dtype)
            earlier = [[(k, v, before)] for k, v in zip(cache[0].unbind(1), cache[1].unbind(1), strict=True)]
        earlier[0] = [*self.memories(slots), *earlier[0]]
        x = self.embed(features, slots, given.condition)
        new_keys, new_values = [], []
        for block, others in zip(self.blocks, earlier, strict=True):
            x, keys, values = block(x, given, others)
            new_keys.append(keys)
            new_values.append(values)
        logits = self.head(self.head_nm(x, given.condition))
        return logits, torch.stack(new_keys, dim=1), torch.stack(new_values, dim=1)


class CachedTransformer(nn.Module):
    """A transformer that is called scale by scale: what becomes an engine."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.transformer = Transformer(config)

    def forward(
        self,
        features: Tensor,
        position: Tensor,
        pooled: Tensor,
        crop: Tensor,
        context: Tensor,
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Transformer.step`."""
        return self.transformer.step(features, position, pooled, crop, context, mask, (keys, values))


class ScaleTransformer(nn.Module):
    """A transformer whose scales see themselves alone, so that nothing is kept from one to the next."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.transformer = Transformer(config)

    def forward(
        self, features: Tensor, position: Tensor, pooled: Tensor, crop: Tensor, context: Tensor, mask: Tensor
    ) -> Tensor:
        """Logits (B, L, V) of a scale; arguments as in :meth:`Transformer.step`."""
        return self.transformer.step(features, position, pooled, crop, context, mask, None)[0]


def build(config: Config) -> nn.Module:
    """The transformer, with its cache as state where a scale sees earlier ones."""
    if not config.sees_earlier:
        return ScaleTransformer(config)
    shape = (config.depth, config.heads, config.tokens, config.head_dim)
    return with_cache(CachedTransformer(config), shape)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """A scale's tokens, where they stand, and the text; guidance takes rows with text and rows without."""
    batch = Dim(name="batch", low=1, typical=2, high=8)
    middle = config.scales[len(config.scales) // 2]
    tokens = Dim(name="tokens", low=1, typical=middle**2, high=config.scales[-1] ** 2)
    last = starts(config.scales)[-2]
    return (
        InputSpec(name="features", role="sample", shape=(batch, tokens, config.channels)),
        InputSpec(name="position", shape=(), dtype="int64", low=0, high=last + 1, default=0),
        InputSpec(name="pooled", role="condition", shape=(batch, config.pooled)),
        InputSpec(name="crop", role="condition", shape=(batch, 4), low=0, high=1024),
        InputSpec(name="context", role="condition", shape=(batch, config.text, config.context)),
        InputSpec(name="mask", role="mask", shape=(batch, config.text), dtype="bool"),
    )


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]]:
    """The calls of a run: each scale in its turn, with the text of one; then of another run with another."""

    def calls(count: int, seed: int) -> list[Arrays]:
        found = []
        for number in range(count):
            run, scale = divmod(number, len(config.scales))
            text = draw(inputs(config), seed=seed + run)
            side, rng = config.scales[scale], np.random.default_rng([seed, number])
            text["features"] = rng.standard_normal((len(text["mask"]), side**2, config.channels)).astype(np.float32)
            text["crop"] = np.full_like(text["crop"], 512) * [1, 1, 0, 0]
            text["crop"] = text["crop"].astype(np.float32)
            found.append({**text, "position": np.asarray(starts(config.scales)[scale], np.int64)})
        return found

    return calls
