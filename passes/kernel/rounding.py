"""Rounding: of numbers to the digits that decide something, and of weights to 8-bit integers.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from enginewright.passes.kernel.digits import six_digits

QMIN, QMAX = -127, 127
"""Of symmetric int8: -128 is left out, so that a weight and its negative round alike."""


def significant(value: float) -> float:
    """A number to 6 significant digits, so that the last bits of another machine decide nothing."""
    return six_digits(value)


def weight_scales(weight: Tensor) -> Tensor:
    """Largest magnitude of each output's weights over 127: weight (N, K) -> (N,); 1 where all are zero."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest > 0, largest / QMAX, torch.ones_like(largest))
