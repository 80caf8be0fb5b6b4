"""Move the range of a layer's inputs into its weights, channel by channel: x W = (x / s) (s W).

Source: Xiao et al. 2022, SmoothQuant, arXiv:2211.10438, equations 3 and 4. The division is folded into the norm
before the layers where that is exact: the norm has a weight, and nothing but these layers reads what it writes.
Elsewhere it is a multiplication before the layer. Departure: the paper folds into preceding linear layers too.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.kernel.surgery import linear_like


def shared_factors(layers: Iterable[nn.Linear], seen: Iterable[InputStatistics], strength: float) -> Tensor | None:
    """Factors (K,) for layers that read the same, by what was seen of that; None with a strength of 0."""
    if strength == 0:
        return None
    inputs = torch.stack([each.sizes.largest for each in seen]).amax(dim=0)
    weights = torch.stack([layer.weight.detach().float().abs().amax(dim=0) for layer in layers]).amax(dim=0)
    return factors(inputs, weights, strength)


def factors(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Equation 4: largest input to the power of ``strength`` over largest weight to the rest.

    Args:
        inputs: largest magnitude (K,) of each input channel.
        weights: largest magnitude (K,) of its weights.
        strength: 0 to 1, how much of the difficulty moves to the weights.

    Returns:
        s (K,); 1 where a channel or its weights are all zero.
    """
    s = inputs.pow(strength) / weights.pow(1 - strength)
    return torch.where((inputs > 0) & (weights > 0), s, torch.ones_like(s))


def scales_with_weight(module: nn.Module) -> bool:
    """Whether this is a norm over the last dimension whose output is proportional to its weight and bias."""
    weight = getattr(module, "weight", None)
    names = {name for name, _ in module.named_parameters()}
    if "Norm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    if not {"weight"} <= names <= {"weight", "bias"} or list(module.buffers()) or weight.is_meta:
        return False
    if isinstance(module, nn.GroupNorm):
        return False
    x = torch.linspace(-2, 3, 4 * len(weight), dtype=weight.dtype).view(4, -1).sin()
    try:
        with torch.no_grad():
            half, whole = divided(module, torch.full_like(weight, 2.0))(x), module(x)
    except Exception:  # it takes other shapes (DRSformer's, of maps): then it is over another dimension
        return False
    return isinstance(half, Tensor) and torch.allclose(2 * half, whole, rtol=1e-3, atol=1e-5)


def divided(norm: nn.Module, s: Tensor) -> nn.Module:
    """A copy of a norm whose output is divided by s (K,)."""
    twin = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters(recurse=False):
        value = (parameter.detach().float() / s).to(parameter.dtype)
        setattr(twin, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    return twin


def multiplied(linear: nn.Linear, s: Tensor | None) -> nn.Linear:
    """A linear layer for inputs that were divided by s (K,); itself without one."""
    if s is None:
        return linear
    weight = (linear.weight.detach().float() * s).to(linear.weight.dtype)
    return linear_like(linear, weight, linear.bias)
