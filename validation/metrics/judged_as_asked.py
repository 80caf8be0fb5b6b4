"""Share of samples that the judge reads as the class that was asked for."""

from __future__ import annotations

import numpy as np

from enginewright.ground.errors import ToolchainError
from enginewright.validation.contract import Drawn, SampleMetric, SamplingTask


class JudgedAsAsked(SampleMetric):
    """From 0 to 1. Near 1 it no longer tells good from better: read it beside ``frechet_ratio``."""

    higher_is_better = True
    relative_tolerance = None
    absolute_tolerance = 0.02  # of a share of samples: at 0.98 of 300, two of its standard deviations are 0.016

    def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
        """Classes (n,) against the classes asked for, (n,)."""
        read = candidate.classes
        if not len(read):
            raise ToolchainError("0 samples were drawn; a share needs at least 1")
        return float(np.mean(read == task.asked(len(read))))
