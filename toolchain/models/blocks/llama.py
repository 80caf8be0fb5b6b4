"""Parts of Llama that several models share: root-mean-square norm, rotary positions, attention, gated feed-forward.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2, which takes the norm from arXiv:1910.07467, the gated
feed-forward from arXiv:2002.05202 and the rotary positions from arXiv:2104.09864. Attribute names are those of the
Llama in transformers, so that checkpoints load.

Shapes: B batch, L tokens, M slots of a cache, D width, H heads, E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.passes.traits import GatedFeedForward, SplitAttention

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of every position: each (B or 1, 1, L, E)."""


def scale_to_unit_rms(x: Tensor, eps: float) -> Tensor:
    """X (B, L, D) over the root mean square of its last dimension, computed in float32 -> (B, L, D)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """Scale tokens to unit root mean square, then by a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """X (B, L, D) -> (B, L, D)."""
        return self.weight * scale_to_unit_rms(x, self.eps)


class Rotary(nn.Module):
    """Cosines and sines by position, for the pairs (i, i + E/2) of a head's features."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, *, longest: int, base: float = 10000.0) -> None:
        super().__init__()
        rate = 1 / base ** (torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(longest)[:, None] * torch.cat([rate, rate])  # (longest, E)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, positions: Tensor) -> Angles:
        """Positions (B or 1, L) below ``longest`` -> cosines and sines, each (B or 1, 1, L, E)."""
        return F.embedding(positions, self.cos)[:, None], F.embedding(positions, self.sin)[:, None]


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn each feature pair (i, i + E/2) of x (B, H, L, E) by its position's angle; the result has the type of x."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module, SplitAttention):
    """Multi-head attention with rotary positions and no biases, whole or with a cache of keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(self, x: Tensor, angles: Angles, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, L, D), mask (B, 1, 1 or L, L), true where a query sees a key -> (B, L, D)."""
        q, k, v = self.project(x, angles)
        return self.join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal))

    def step(
        self, x: Tensor, angles: Angles, keys: Tensor, values: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to a cache of earlier tokens and, causally, to x itself; the cache is read, and never copied.

        Args:
            x: (B, L, D).
            angles: of the positions of x.
            keys: (B, H, M, E).
            values: (B, H, M, E).
            before: (B or 1, 1, 1, M), true for the slots of earlier tokens.

        Returns:
            The output (B, L, D), and the keys and values of x (B, H, L, E).
        """
        q, k, v = self.project(x, angles)
        # A cache keeps its type where the layer has another.
        earlier = (q @ keys.to(q.dtype).mT).masked_fill(~before, -torch.inf)  # (B, H, L, M)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        own = (q @ k.mT).masked_fill(later, -torch.inf)  # (B, H, L, L)
        weights = (torch.cat([earlier, own], dim=-1) * self.head_dim**-0.5).softmax(dim=-1)
        slots = keys.shape[2]
        y = weights[..., :slots] @ values.to(q.dtype) + weights[..., slots:] @ v
        return self.join_heads(y), k, v

    def project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """X (B, L, D) -> queries and keys, turned by position, and values, each (B, H, L, E)."""
        q, k, v = self.heads_of(x)
        return rotate(q, angles), rotate(k, angles), v


class GatedMlp(nn.Module, GatedFeedForward):
    """SwiGLU without biases: a SiLU gate times a linear, then a linear back."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, L, D) -> (B, L, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
