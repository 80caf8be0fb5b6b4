"""Kernel distance of the judge's features of samples to those of real pictures; no Inception network is asked."""

from __future__ import annotations

import numpy as np

from enginewright.ground.errors import ToolchainError, require
from enginewright.validation.contract import Drawn, SampleMetric, SamplingTask

BLOCK = 1000
"""Samples that one estimate is made of, as in the paper; a kernel matrix of all of them would not fit."""


class Kid(SampleMetric):
    """Squared maximum mean discrepancy under the kernel (x y / d + 1)^3; may fall below 0 for clouds that are equal.

    Source: Binkowski et al. 2018, arXiv:1801.01401, section 4; torchmetrics' ``poly_mmd``. Unlike the Frechet distance
    its mean does not depend on the number of samples, so that runs of different sizes can be compared.
    """

    higher_is_better = False
    absolute_tolerance = 2.0  # of 200 digits, equal clouds scatter by 0.8 around 0; a shift by 0.3 deviations is 38

    def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
        """Features (n, d) against real ones, (m, d): the mean over disjoint blocks of as many of each.

        Raises:
            ToolchainError: fewer than two samples, or torchmetrics is not installed.
        """
        ours, real = (np.asarray(features, np.float64) for features in (candidate.features, task.real))
        least = min(len(ours), len(real))
        if least < 2:
            raise ToolchainError(f"{least} samples; the kernel distance needs at least 2")
        if not (np.isfinite(ours).all() and np.isfinite(real).all()):
            return float("nan")
        kid = require("torchmetrics.image.kid", extra="metrics")
        torch = require("torch", extra="metrics")
        blocks = -(-least // BLOCK)
        # Drawn without order, since real pictures often stand by their classes.
        mixed = [torch.from_numpy(each[np.random.default_rng(0).permutation(len(each))]) for each in (real, ours)]
        size = least // blocks
        parts = [[each[place * size : (place + 1) * size] for each in mixed] for place in range(blocks)]
        return float(np.mean([float(kid.poly_mmd(*pair)) for pair in parts]))
