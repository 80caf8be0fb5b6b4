"""Signal-to-noise ratio: the original is the signal, the difference the noise."""

from __future__ import annotations

import numpy as np

from enginewright.ground.signature import Array
from enginewright.validation.contract import OutputMetric
from enginewright.validation.statistics import difference, flat


class SnrDb(OutputMetric):
    """10 log10(sum b^2 / sum (a - b)^2) with b the original; that is -20 log10 of ``relative_l2``."""

    higher_is_better = True
    unit = "dB"
    kept = False  # it is relative_l2 in decibels

    def measure(self, original: Array, candidate: Array) -> float:
        """Infinite when equal, minus infinite when only the original is zero."""
        noise = np.square(difference(original, candidate)).sum()
        if noise == 0:
            return float("inf")
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(10 * np.log10(np.square(flat(original)).sum() / noise))
