"""How far tensors are from what is wanted: ``enginewright.ground.distance`` of tensors."""

from __future__ import annotations

import math

from torch import Tensor


def relative_l2(wanted: Tensor, got: Tensor) -> float:
    """||got - wanted|| / ||wanted|| over all elements, in double precision.

    0 when equal, also when both are zero; infinite when only ``wanted`` is zero. Both have one shape.
    """
    wanted, got = wanted.detach().double(), got.detach().double()
    error, size = float((got - wanted).norm()), float(wanted.norm())
    if error == 0:
        return 0.0
    return error / size if size else math.inf
