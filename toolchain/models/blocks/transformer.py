"""Parts that several transformers share: multi-head self-attention, the two-layer MLP, and a block of both.

Shapes: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.passes.traits import FusedAttention, PlainBlock, PlainFeedForward


class SelfAttention(nn.Module, FusedAttention):
    """Multi-head self-attention with one fused query-key-value projection.

    The number of heads and the width of a head are kept apart from the model's width, so that heads can be removed.
    """

    def __init__(self, width: int, heads: int, *, head_dim: int | None = None, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim or width // heads
        self.qkv = nn.Linear(width, 3 * heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * self.head_dim, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """X (B, N, D), mask broadcastable to (B, H, N, N), true where a token sees another -> (B, N, D)."""
        q, k, v = self.heads_of(x)  # each (B, H, N, D/H)
        return self.join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Mlp(nn.Module, PlainFeedForward):
    """Two linear layers with a GELU between them, by default approximated by tanh."""

    def __init__(self, width: int, hidden: int, *, approximate: Literal["tanh", "none"] = "tanh") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, N, D) -> (B, N, D)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module, PlainBlock):
    """Self-attention and an MLP with an exact GELU, each after a layer norm and beside a residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, *, eps: float = 1e-5, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_ratio * width, approximate="none")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), mask as in :class:`SelfAttention` -> (B, N, D)."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


def bias_by_distance(table: Tensor, distance: Tensor) -> Tensor:
    """What each head adds to a query and a key of a map by how many rows and columns they are apart.

    Args:
        table: (H, R, R), by rows apart and by columns apart.
        distance: (S, S), the entry of the table for two rows, or two columns, of the map.

    Returns:
        (H, S*S, S*S).
    """
    bias = table[:, distance][..., distance]  # (H, S, S, S, S): rows of query and key, columns of both
    return bias.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def start_small(module: nn.Module) -> None:
    """Start a linear layer: truncated normal, standard deviation 0.02, no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
