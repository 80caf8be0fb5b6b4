"""Wide attention: a classifier of text with all attention heads in one layer, beside one that stacks layers of them.

Source: Brown et al. 2022, arXiv:2210.00640. No code of the authors was found, nor the paper's widths: the sizes here
are ours, and what is marked below as not given is our choice. ``deep`` and ``wide`` have the same heads in all, the
same width of a head, of a token and of the MLP; they differ in layers alone. So attention is the same work in both, and
wide lacks all MLPs but one. Both are trained from scratch: none is made from the other.

In PyTorch attention is fused: the scores of all heads are never stored. ONNX Runtime fuses nothing here and stores the
scores of all heads that one call attends with; they are therefore handed over ``heads_at_once`` at a time, which
changes no value. For 2,048 tokens its process grows to 1.0 GB, as for ``deep``; with all 48 heads at once it grows to
3.7 GB (ONNX Runtime 1.32 on a CPU, one document).

Shapes: B batch, N tokens (bytes), D width, H heads of a layer, d width of a head, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.models.blocks.transformer import Mlp
from enginewright.passes.traits import FusedAttention, StreamBlock
from enginewright.validation.contract import ClassifyingTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of the classifier. The paper fixes ``layers * heads`` and everything below it.

    Args:
        layers: of attention and an MLP.
        heads: of one layer.
        head_dim: width of a head; that of a token has nothing to do with it.
        width: of a token.
        hidden: width of an MLP.
        heads_at_once: heads whose scores an engine may hold at once, where it does not fuse attention.
        vocabulary: 256 bytes, padding, and three that are free for other marks.
        longest: most tokens of a document.
        classes: logits.
        documents: 1 classifies a document, 2 compares two.
    """

    layers: int
    heads: int
    head_dim: int = 64
    width: int = 512
    hidden: int = 2048
    heads_at_once: int = 8
    vocabulary: int = 260
    longest: int = 4096
    classes: int = 2
    documents: int = 1


DEEP = Config(layers=6, heads=8)
WIDE = Config(layers=1, heads=48)
PUBLISHED = {  # ours, not the paper's
    "deep": DEEP,
    "wide": WIDE,
    "matcher-deep": replace(DEEP, documents=2),
    "matcher-wide": replace(WIDE, documents=2),
}
READER = replace(DEEP, heads=4, head_dim=16, width=64, hidden=256, longest=128, classes=4)
SHIPPED = {"glosses-deep": READER, "glosses-wide": replace(READER, layers=1, heads=24)}
TINY = Config(layers=1, heads=6, head_dim=8, width=16, hidden=32, heads_at_once=4, vocabulary=20, longest=64)
OUTPUTS = ("logits",)


class WideAttention(nn.Module, FusedAttention):
    """Self-attention with as many heads as wanted: their widths together may exceed the width of a token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.head_dim, self.heads_at_once = config.heads, config.head_dim, config.heads_at_once
        self.qkv = nn.Linear(config.width, 3 * self.heads * self.head_dim)
        self.proj = nn.Linear(self.heads * self.head_dim, config.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, N, D), bias (B, 1, 1, N), which is added to the scores of a key -> (B, N, D)."""
        some = (part.split(self.heads_at_once, dim=1) for part in self.heads_of(x))  # each (B, heads_at_once, N, d)
        parts = [F.scaled_dot_product_attention(q, k, v, attn_mask=bias) for q, k, v in zip(*some, strict=True)]
        return self.join_heads(torch.cat(parts, dim=1))


class Layer(nn.Module, StreamBlock):
    """Attention and an MLP, each after a norm: the place of norms and the MLP's GELU are not given in the paper."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = WideAttention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, N, D), bias (B, 1, 1, N) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Encode documents as the mean of their tokens. Learned positions and the mean are not given in the paper."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.longest, config.width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, N), mask (B, N), true for tokens and false for padding -> (B, D)."""
        x = self.embedding(ids) + self.positions[: ids.shape[1]]  # (B, N, D)
        # The least finite number, not minus infinity: a document of padding alone gets finite logits.
        bias = (~mask)[:, None, None].to(x.dtype) * torch.finfo(x.dtype).min  # (B, 1, 1, N)
        for layer in self.layers:
            x = layer(x, bias)
        real = mask[..., None].float()  # (B, N, 1); the sum is in float32, for thousands of tokens
        mean = (self.norm(x).float() * real).sum(1) / real.sum(1).clamp(min=1)
        return mean.to(x.dtype)


class Classifier(nn.Module):
    """Give the logits of a document's classes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, N), mask (B, N), true for tokens -> (B, C)."""
        return self.head(self.encoder(ids, mask))


class Matcher(nn.Module):
    """Compare two documents, which one encoder reads: the four features of the pair are not given in the paper."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.head = nn.Linear(4 * config.width, config.classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, 2, N), mask (B, 2, N), true for tokens -> (B, C)."""
        one, two = self.encoder(ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)  # each (B, D)
        return self.head(torch.cat([one, two, one * two, one - two], dim=1))


def build(config: Config) -> Classifier | Matcher:
    """The network, started at random."""
    return Matcher(config) if config.documents == 2 else Classifier(config)


def task(size: str, config: Config) -> ClassifyingTask | None:
    """Tell parts of speech, where a network was trained to."""
    del config
    if size not in SHIPPED:
        return None
    from enginewright.models.blocks.glosses import gloss_task

    return gloss_task()


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]] | None:
    """Glosses that are neither trained on nor judged, where a network was trained on glosses."""
    del module, config
    if size not in SHIPPED:
        return None
    from enginewright.models.blocks.glosses import unjudged

    return unjudged


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Bytes of each document, and which of them are no padding; one document at a time is the usual case."""
    batch = Dim(name="batch", low=1, typical=1, high=4)
    tokens = Dim(name="tokens", low=1, typical=config.longest // 4, high=config.longest)
    shape = (batch, tokens) if config.documents == 1 else (batch, config.documents, tokens)
    return (
        InputSpec(name="ids", role="sample", shape=shape, dtype="int64", low=0, high=config.vocabulary),
        InputSpec(name="mask", role="mask", shape=shape, dtype="bool"),
    )
