"""Size of the error beside the size of the original output."""

from __future__ import annotations

from enginewright.ground.distance import relative_l2
from enginewright.ground.signature import Array
from enginewright.validation.contract import OutputMetric


class RelativeL2(OutputMetric):
    """||a - b|| / ||b|| with b the original; both norms over all elements."""

    higher_is_better = False

    def measure(self, original: Array, candidate: Array) -> float:
        """0 when equal, also when both are zero; infinite when only the original is zero."""
        return relative_l2(original, candidate)
