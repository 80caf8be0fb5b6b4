"""Mean absolute difference over all elements."""

from __future__ import annotations

import numpy as np

from enginewright.ground.signature import Array
from enginewright.validation.contract import OutputMetric
from enginewright.validation.statistics import difference


class MeanAbs(OutputMetric):
    """mean |a - b|, in the output's own unit."""

    higher_is_better = False

    def measure(self, original: Array, candidate: Array) -> float:
        """0 for an output without elements."""
        return float(np.abs(difference(original, candidate)).sum() / max(original.size, 1))
