"""The 2:4 pattern of weights: at most two of every four along a layer's inputs are not zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PATTERN = "2:4"
"""What plans call it."""


def is_two_in_four(weight: Tensor) -> bool:
    """Whether a matrix (N, K) keeps at most two of every four weights along K, and is not all zero."""
    if weight.ndim != 2 or weight.shape[1] % 4 or weight.is_meta:
        return False
    kept = (weight != 0).unflatten(1, (-1, 4)).sum(-1)
    return bool((kept <= 2).all()) and bool(kept.any())


def keeps_pattern(layer: nn.Module) -> bool:
    """Whether a layer's weight has the pattern; 8-bit ones lie with their inputs first, (K, N)."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return is_two_in_four(weight.detach() if weight.is_floating_point() else weight.T)


def mask_of(weight: Tensor) -> Tensor | None:
    """Where a matrix of the pattern is not zero; None for any other."""
    return (weight.detach() != 0).to(weight.dtype) if is_two_in_four(weight.detach().to(torch.float32)) else None
