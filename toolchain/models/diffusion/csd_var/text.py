"""CSD-VAR's text encoders: two CLIPs side by side, and what the content says is taken out of the style's tokens.

Source: Nguyen et al. 2025, arXiv:2507.13984 (rectification by singular vectors); the encoders are CLIP's, Radford et
al. 2021, arXiv:2103.00020, and OpenCLIP's, as Switti, arXiv:2412.01819, uses them. Checked against
visual-ar-group/CSD-VAR at 37507e7 (clip.py, extract_svd.py): which layer is rectified, where, and by which matrix. The
encoders are those of transformers, with which outputs agree for the same weights. Attribute names are those of
transformers after ``text_model``, but for ``o_proj`` (``out_proj``).

The authors find the style's tokens by their ids; here a mask says where they stand. Padding is not masked: it comes
after all other tokens, which attend to none after themselves. The text as a whole is read at the first end mark, where
transformers, told an old configuration, takes the greatest id, and that of a learned token is greater.

Shapes: B batch, T tokens, D width, H heads, n texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec
from enginewright.passes.traits import PlainFeedForward, SplitAttention, StreamBlock

LEARNED = 8
"""Tokens whose embeddings are learned: four for the content, then four for the style."""
RANK = 10
"""Singular vectors of the content's texts that are taken out."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A size of one encoder."""

    width: int
    depth: int
    heads: int
    hidden: int
    activation: Literal["quick", "exact"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of both encoders; the end mark is the last id of the vocabulary, and learned tokens come after it."""

    first: Clip
    second: Clip
    vocabulary: int = 49408
    text: int = 77

    @property
    def end(self) -> int:
        """The id of the end mark."""
        return self.vocabulary - 1


PUBLISHED = {
    "clip-l-bigg": Config(
        first=Clip(width=768, depth=12, heads=12, hidden=3072, activation="quick"),
        second=Clip(width=1280, depth=32, heads=20, hidden=5120, activation="exact"),
    )
}
TINY = Config(
    first=Clip(width=8, depth=1, heads=2, hidden=16, activation="quick"),
    second=Clip(width=16, depth=2, heads=2, hidden=32, activation="exact"),
    vocabulary=50,
    text=7,
)
SHIPPED: dict[str, Config] = {}
OUTPUTS = ("context", "pooled")


class Attention(nn.Module, SplitAttention):
    """Attention to a token itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, heads * self.head_dim) for _ in range(3))
        self.o_proj = nn.Linear(heads * self.head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, D) -> (B, T, D)."""
        q, k, v = self.heads_of(x)
        return self.join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class QuickGelu(nn.Module):
    """The approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """X of any shape -> the same."""
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module, PlainFeedForward):
    """Two linear layers with an activation between them."""

    def __init__(self, config: Clip) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.act = QuickGelu() if config.activation == "quick" else nn.GELU()
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, D) -> (B, T, D)."""
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module, StreamBlock):
    """Attention and an MLP, each after a norm and beside a residual."""

    def __init__(self, config: Clip) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = Attention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def content_projection(features: Tensor, rank: int = RANK) -> Tensor:
    """The matrix that keeps of a row what lies along the first singular vectors of features (n, D) -> (D, D).

    Features are an encoder's of about two hundred texts for things like the picture's content.
    """
    vectors = torch.linalg.svd(features, full_matrices=False).Vh[:rank]  # (rank, D)
    return vectors.mT @ vectors


class Encoder(nn.Module):
    """One CLIP encoder of text, and the content's projection in its space."""

    projection: Tensor

    def __init__(self, config: Clip, vocabulary: int, text: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary + LEARNED, config.width)
        self.position_embedding = nn.Embedding(text, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.register_buffer("projection", torch.zeros(config.width, config.width))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, D), not rectified."""
        x = self.token_embedding(ids) + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)

    def rectify(self, x: Tensor, style: Tensor) -> Tensor:
        """x (B, T, D), style (B, T), true at the style's learned tokens -> x less the content's part there."""
        return x - style[..., None].to(x.dtype) * (x @ self.projection.to(x.dtype))


class Text(nn.Module):
    """Both encoders, and their rectified tokens side by side."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.end = config.end
        self.first = Encoder(config.first, config.vocabulary, config.text)
        self.second = Encoder(config.second, config.vocabulary, config.text)

    def forward(self, ids: Tensor, ids_second: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """Encode texts.

        Args:
            ids: (B, T), padded as the first encoder's tokenizer pads.
            ids_second: (B, T), as the second's does.
            style: (B, T), true at the style's learned tokens.

        Returns:
            The tokens (B, T, D1 + D2), and the text as a whole (B, D2).
        """
        first, second = self.first(ids), self.second(ids_second)
        end = (ids_second == self.end).long().argmax(dim=1)  # (B,)
        pooled = second.gather(1, end[:, None, None].expand(-1, 1, second.shape[2]))[:, 0]
        return torch.cat([self.first.rectify(first, style), self.second.rectify(second, style)], dim=2), pooled


def build(config: Config) -> Text:
    """Both encoders, with layers that start so that values keep their size, and the projections of random features."""
    net = Text(config)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    for encoder in (net.first, net.second):
        if not encoder.projection.is_meta:
            width = encoder.projection.shape[0]
            encoder.projection.copy_(content_projection(torch.randn(200, width), min(RANK, width // 2)))
    return net


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Token ids, learned ones among them, and where the style's stand."""
    batch = Dim(name="batch", low=1, typical=2, high=8)
    shape, high = (batch, config.text), config.vocabulary + LEARNED
    return (
        InputSpec(name="ids", role="condition", shape=shape, dtype="int64", low=0, high=high),
        InputSpec(name="ids_second", role="condition", shape=shape, dtype="int64", low=0, high=high),
        InputSpec(name="style", role="mask", shape=shape, dtype="bool"),
    )
