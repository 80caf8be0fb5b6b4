"""Vevo's content decoder: a Llama that continues content-style tokens, given content tokens (or text) and a style.

Source: Zhang et al. 2025, arXiv:2502.07243 (content-style modeling); the sizes are those of the authors' released
configurations. Checked against open-mmlab/Amphion at d3de90f (ar_model.py and its two configurations): parameter
counts, special tokens and the order of a sequence. Their network is the LlamaForCausalLM of transformers, with whose
outputs ours agree for the same weights. Attribute names are those of transformers: of a released checkpoint, strip
``model.model.`` or, before ``lm_head``, ``model.``. Left out: the optional global style encoder, which both released
sizes switch off.

``forward`` reads a whole sequence. ``step`` is for deployment, and what is exported: keys and values lie in a cache of
fixed length, the program's state, and one engine reads a prompt (position 0) and then one token at a time.

Shapes: B batch, L tokens, V vocabulary, N layers, M slots of the cache, D width, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enginewright.ground.signature import Array, Arrays, Dim, InputSpec
from enginewright.models.blocks.decoding import decoding_task, steps_of_sequence, with_cache
from enginewright.models.blocks.llama import Angles, Attention, GatedMlp, RMSNorm, Rotary
from enginewright.passes.networks import Networks
from enginewright.passes.traits import StreamBlock
from enginewright.validation.contract import DecodingTask

PROMPT = 8
"""Content codes, and style codes, of a prompt that figures are measured on."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of the decoder, and the layout of its vocabulary.

    Ids are output codes first, then input ids (text, then content codes), then padding and the four marks, and room
    for a few more.
    """

    depth: int
    width: int
    heads: int
    hidden: int
    texts: int = 1024
    contents: int = 0
    outputs: int = 8192
    spare: int = 20
    longest: int = 2000
    """Most tokens of a sequence, prompt and all: where the authors' generation stops."""

    @property
    def padding(self) -> int:
        """The id after all codes; the four marks follow it."""
        return self.texts + self.contents + self.outputs

    @property
    def begin_input(self) -> int:
        """The mark before text or content tokens."""
        return self.padding + 1

    @property
    def end_input(self) -> int:
        """The mark after text or content tokens."""
        return self.padding + 2

    @property
    def begin_output(self) -> int:
        """The mark before content-style tokens."""
        return self.padding + 3

    @property
    def end_output(self) -> int:
        """The mark after content-style tokens, which ends generation."""
        return self.padding + 4

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding and of the logits."""
        return self.padding + self.spare


PUBLISHED = {
    "conversion": Config(depth=12, width=1536, heads=16, hidden=6144, contents=32),
    "tts": Config(depth=12, width=1920, heads=16, hidden=7680),
}
TINY = Config(depth=2, width=64, heads=4, hidden=256, texts=16, contents=8, outputs=32, longest=64)


SHIPPED: dict[str, Config] = {}
OUTPUTS = ("logits",)
JOB_NEEDS_TRAINING = False
"""Whether runs from prompts say nothing of random weights: engines must go on as the model does with any."""


class DecoderLayer(nn.Module, StreamBlock):
    """Causal attention and a gated feed-forward, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(width)
        self.self_attn = Attention(width, heads)
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = GatedMlp(width, hidden)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """X (B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.input_layernorm(x), angles, causal=True)
        return x + self.mlp(self.post_attention_layernorm(x))

    def step(
        self, x: Tensor, angles: Angles, keys: Tensor, values: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D), keys and values (B, H, M, E) -> (B, L, D), and the keys and values of x (B, H, L, E)."""
        y, keys, values = self.self_attn.step(self.input_layernorm(x), angles, keys, values, before)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class Decoder(nn.Module):
    """Predict the next token of a sequence of content (or text) and content-style tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.rotary = Rotary(config.width // config.heads, longest=config.longest)
        self.layers = nn.ModuleList(
            DecoderLayer(config.width, config.heads, config.hidden) for _ in range(config.depth)
        )
        self.norm = RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(initialize)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L) int64 -> logits (B, L, V) of what follows each token."""
        angles = self.rotary(torch.arange(ids.shape[1], device=ids.device)[None])
        h = self.embed_tokens(ids)  # (B, L, D)
        for layer in self.layers:
            h = layer(h, angles)
        return self.lm_head(self.norm(h))

    def step(self, ids: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the next tokens of sequences whose earlier keys and values are cached.

        What lies in the cache at ``position`` and beyond is not read. So a prompt may be padded at its end: read it
        whole, then its last true token once more at that token's own position, for its logits.

        Args:
            ids: (B, L) int64; a whole prompt, or one token.
            keys: (B, N, H, M, E) of earlier tokens.
            values: (B, N, H, M, E).
            position: where ids[:, 0] stands, int64, () for all sequences or (B,); at most M.

        Returns:
            Logits (B, V) of what follows the last token, and the keys and the values of these tokens, (B, N, H, L, E),
            which a caller writes into the cache at their positions.
        """
        slots = position.reshape(-1, 1) + torch.arange(ids.shape[1], device=ids.device)  # (B or 1, L)
        places = torch.arange(keys.shape[3], device=ids.device)
        before = places < position.reshape(-1, 1, 1, 1)  # (B or 1, 1, 1, M)
        angles = self.rotary(slots)
        h = self.embed_tokens(ids)  # (B, L, D)
        new_keys, new_values = [], []
        for layer, old_k, old_v in zip(self.layers, keys.unbind(1), values.unbind(1), strict=True):
            h, k, v = layer.step(h, angles, old_k, old_v, before)  # type: ignore[operator]
            new_keys.append(k)
            new_values.append(v)
        return self.lm_head(self.norm(h[:, -1])), torch.stack(new_keys, dim=1), torch.stack(new_values, dim=1)

    def empty_cache(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Zeros for keys and for values, each (batch, N, H, length, E)."""
        weight = self.embed_tokens.weight
        shape = (batch, *cache_shape(self.config, length))
        return weight.new_zeros(shape), weight.new_zeros(shape)


class CachedDecoder(nn.Module):
    """A decoder that is called step by step: what becomes an engine."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.decoder = Decoder(config)

    def forward(self, ids: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Decoder.step`."""
        return self.decoder.step(ids, keys, values, position)


def cache_shape(config: Config, length: int) -> tuple[int, ...]:
    """The shape of one row's keys, and of its values: (N, H, length, E)."""
    return config.depth, config.heads, length, config.width // config.heads


def build(config: Config) -> Networks:
    """The decoder with its cache as state."""
    return with_cache(CachedDecoder(config), cache_shape(config, config.longest))


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """A prompt at position 0, or the tokens that go on from there."""
    batch = Dim(name="batch", low=1, typical=1, high=4)
    tokens = Dim(name="tokens", low=1, typical=1, high=config.longest // 2)
    return (
        InputSpec(name="ids", shape=(batch, tokens), dtype="int64", low=0, high=config.vocabulary),
        InputSpec(name="position", shape=(), dtype="int64", low=0, high=config.longest // 2, default=0),
    )


def task(size: str, config: Config) -> DecodingTask:
    """Prompts of content and style codes, continued by the likeliest tokens."""

    def prompts(n: int, seed: int) -> Array:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(config.contents or config.texts, (n, PROMPT), generator=generator)
        style = torch.randint(config.outputs, (n, PROMPT), generator=generator)
        found: Array = sequence(config, codes + (config.texts if config.contents else 0), style).numpy()
        return found

    return decoding_task(prompts, tokens=min(config.longest // 4, 64), samples=4)


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]]:
    """A prompt, and then a token at a time: the calls of one sequence."""
    return lambda count, seed: steps_of_sequence(config.vocabulary, 2 * PROMPT + 3, count=count, seed=seed)


def initialize(module: nn.Module) -> None:
    """Start a linear layer or an embedding as Llama does in transformers: normal, standard deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def sequence(config: Config, given: Tensor, style: Tensor) -> Tensor:
    """The prompt that generation continues: what is to be said, between marks, then the style reference's tokens.

    Args:
        config: the layout of the vocabulary.
        given: (B, I) text ids from 0, or content codes counted from ``config.texts``: the style reference's, then the
            source's. Content codes that repeat their neighbour are left out before; the authors tokenize the two
            waves as one.
        style: (B, J) content-style codes of the style reference.

    Returns:
        Ids (B, I + J + 3).
    """
    mark = given.new_ones(len(given), 1)
    return torch.cat(
        [
            mark * config.begin_input,
            given + config.outputs,
            mark * config.end_input,
            mark * config.begin_output,
            style,
        ],
        dim=1,
    )


def without_repeats(codes: Tensor) -> Tensor:
    """Codes (L,) less those that equal the one before: durations are left out of the content."""
    return torch.unique_consecutive(codes)
