"""How far the mel spectra of sounds are from those of the original's."""

from __future__ import annotations

from enginewright.ground.distance import relative_l2
from enginewright.ground.signature import Array
from enginewright.validation.contract import SpectraTask, WorkloadMetric
from enginewright.validation.statistics import check_pair


class MelDistance(WorkloadMetric):
    """||a - b|| / ||b|| of log-mel spectra (n, M, T), b the original's: near to what an ear tells apart.

    Source: the mel spectra that HiFi-GAN is trained to match (Kong et al. 2020, arXiv:2010.05646), here by a relative
    L2 norm, there by a mean of absolute differences. Blind to phases.
    """

    workload = SpectraTask
    compares = True
    higher_is_better = False
    absolute_tolerance = 1e-4  # float32 rounding of a vocoder is at 1e-6; 8-bit weights are above 1e-3

    def measure(self, task: SpectraTask, original: Array, candidate: Array) -> float:
        """Results of both, from the same inputs; NaN where the candidate's are not finite.

        Raises:
            ToolchainError: they cannot be paired.
        """
        check_pair("sounds", original, candidate)
        return relative_l2(task.log_mel(original), task.log_mel(candidate))
