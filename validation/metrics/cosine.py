"""Cosine of the angle between two outputs, each taken as one long vector."""

from __future__ import annotations

import numpy as np

from enginewright.ground.signature import Array
from enginewright.validation.contract import OutputMetric
from enginewright.validation.statistics import flat


class Cosine(OutputMetric):
    """a·b / (||a|| ||b||). Blind to scale: read it beside ``relative_l2``."""

    higher_is_better = True
    relative_tolerance = None
    absolute_tolerance = 1e-4  # an error of 1.4 % in relative_l2, which has its own, finer bound

    def measure(self, original: Array, candidate: Array) -> float:
        """In [-1, 1]; 1 for two zero vectors, 0 when only one of them is zero."""
        a, b = flat(candidate), flat(original)
        with np.errstate(invalid="ignore"):
            product, lengths = a @ b, (np.linalg.norm(a), np.linalg.norm(b))
            if 0 in lengths:
                return 1.0 if lengths[0] == lengths[1] else float(product)  # 0, or NaN when the other is not finite
            return float(np.clip(product / lengths[0] / lengths[1], -1, 1))
