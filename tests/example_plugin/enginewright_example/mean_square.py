"""Mean square of the error, in the output's unit squared."""

from __future__ import annotations

import numpy as np

from enginewright.ground.signature import Array
from enginewright.validation.contract import OutputMetric


class MeanSquare(OutputMetric):
    """Mean of (a - b) ** 2."""

    higher_is_better = False

    def measure(self, original: Array, candidate: Array) -> float:
        """0 when equal or empty."""
        error = candidate.astype(np.float64) - original.astype(np.float64)
        return float(np.mean(error**2)) if error.size else 0.0
