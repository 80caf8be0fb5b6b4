"""Attention that keeps only the largest probabilities of each query, around a layer of any family.

Source: AxFormer, Nagarajan et al. 2020, arXiv:2010.03688: the K largest stay, the rest become zero, and nothing is
normalized again. In threshold form: what is not below the K-th largest stays, so that equal values stay together.

Shapes: B batch, H heads, N queries, M keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class HardAttention(nn.Module):
    """Runs an attention layer with hard probabilities; whatever it takes and gives, this does too.

    A layer computes its attention in a function (fused or with a softmax), not in a module: while it runs, that
    function is another one. Export traces what runs, so that the graph has the hard form.

    Args:
        inner: the layer.
        keep: probabilities left to each query; more than there are keys is all of them.
        on: False runs the layer as it is.
    """

    def __init__(self, inner: nn.Module, keep: int, *, on: bool = True) -> None:
        super().__init__()
        self.inner, self.keep, self.on = inner, keep, on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives."""
        if not self.on:
            return self.inner(*args, **kwargs)
        with Hard(self.keep):
            return self.inner(*args, **kwargs)


class Hard(TorchFunctionMode):
    """While entered, softmax and the fused attention are hard."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the two; hand on everything else."""
        if func is F.scaled_dot_product_attention:
            return hard_attention(*args, **(kwargs or {}), keep=self.keep)
        found = func(*args, **(kwargs or {}))
        return largest(found, self.keep) if func in SOFTMAX else found


def largest(p: Tensor, keep: int) -> Tensor:
    """Zero what is below the ``keep``-th largest value of the last dimension: (..., M) -> (..., M)."""
    values = torch.topk(p, min(keep, p.shape[-1]), dim=-1).values
    return torch.where(p >= values[..., -1:], p, torch.zeros_like(p))


def hard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    keep: int,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with hard probabilities: (B, H, N, D), twice (B, H, M, D) -> (B, H, N, D)."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, N, M)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    p = F.dropout(largest(scores.softmax(dim=-1), keep), dropout_p)
    return p @ value
