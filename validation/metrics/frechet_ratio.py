"""Frechet distance of samples, in units of what as many real pictures score."""

from __future__ import annotations

from enginewright.ground.errors import ToolchainError
from enginewright.validation.contract import Drawn, SampleMetric, SamplingTask
from enginewright.validation.metrics.frechet_distance import FrechetDistance
from enginewright.validation.statistics import frechet_distance


class FrechetRatio(SampleMetric):
    """``frechet_distance`` over the distance of as many other real pictures: 1 is as good as real.

    The distance of a small sample is large even for real pictures; the ratio takes that floor out.
    """

    higher_is_better = False

    def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
        """Features (n, d) against the first n rows of ``real_again``, (k, d), whose classes interleave.

        Raises:
            ToolchainError: fewer samples than the task's floor, or fewer real pictures than samples.
        """
        distance = FrechetDistance().measure(task, original, candidate)
        samples, real = len(candidate.features), len(task.real_again)
        if real < samples:
            raise ToolchainError(
                f"{samples} samples, but only {real} other real pictures to set the floor of the distance",
                help=f"draw fewer: samples = {real}",
            )
        floor = frechet_distance(task.real_again[:samples], task.real)
        if floor == 0:
            raise ToolchainError("the other real pictures are at distance 0 from the real ones: a floor of 0")
        return distance / floor
