"""Frechet distance of the judge's features of samples to those of real pictures; no FID, which needs Inception."""

from __future__ import annotations

from enginewright.ground.errors import ToolchainError
from enginewright.validation.contract import Drawn, SampleMetric, SamplingTask
from enginewright.validation.statistics import frechet_distance


class FrechetDistance(SampleMetric):
    """In squared feature units. Depends on the number of samples: compare runs of one size only."""

    higher_is_better = False

    def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
        """Features (n, d) against real ones, (m, d).

        Raises:
            ToolchainError: fewer samples than the task's floor.
        """
        samples = len(candidate.features)
        if samples < max(task.floor, 2):
            raise ToolchainError(
                f"{samples} samples; the Frechet distance needs at least {max(task.floor, 2)}",
                help=f"draw more: samples = {max(task.floor, task.samples)}",
            )
        return frechet_distance(candidate.features, task.real)
