"""Share of inputs whose class is told right."""

from __future__ import annotations

import numpy as np

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Array
from enginewright.validation.contract import ClassifyingTask, ClassMetric


class Accuracy(ClassMetric):
    """From 0 to 1, against the true classes, not against what the original tells."""

    higher_is_better = True
    relative_tolerance = None
    absolute_tolerance = (
        0.007  # what IA-RED2 (arXiv:2106.12620) allows itself, and one standard deviation at 0.97 of 600
    )

    def measure(self, task: ClassifyingTask, original: Array, candidate: Array) -> float:
        """Classes told and true ones (n, 2).

        Raises:
            ToolchainError: there are none.
        """
        if not len(candidate):
            raise ToolchainError("0 inputs were classified; a share needs at least 1")
        return float(np.mean(candidate[:, 0] == candidate[:, 1]))
