"""Parts that several transformers share: multi-head self-attention and the two-layer MLP.

Shapes: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
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
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D/H)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, D/H)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, by default approximated by tanh."""

    def __init__(self, width: int, hidden: int, *, approximate: Literal["tanh", "none"] = "tanh") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, N, D) -> (B, N, D)."""
        return self.fc2(self.act(self.fc1(x)))
