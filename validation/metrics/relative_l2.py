"""Size of the error beside the size of the original output."""

from __future__ import annotations

import numpy as np

from enginewright.ground.signature import Array
from enginewright.validation.contract import OutputMetric
from enginewright.validation.statistics import difference, flat


class RelativeL2(OutputMetric):
    """||a - b|| / ||b|| with b the original; both norms over all elements."""

    higher_is_better = False

    def measure(self, original: Array, candidate: Array) -> float:
        """0 when equal, also when both are zero; infinite when only the original is zero."""
        error = np.linalg.norm(difference(original, candidate))
        if error == 0:
            return 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(error / np.linalg.norm(flat(original)))
