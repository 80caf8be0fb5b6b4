"""How alike the structure of the candidate's pictures is to that of the original's, drawn from the same noise."""

from __future__ import annotations

import numpy as np

from enginewright.ground.errors import ToolchainError, require
from enginewright.validation.contract import Drawn, SampleMetric, SamplingTask

RANGE = (-1.0, 1.0)
"""Where pictures live."""

SMALLEST = 11
"""Pixels of the window that means and variances are taken in, along each axis."""


class Ssim(SampleMetric):
    """Mean over samples of the structural similarity index, 1 for equal pictures.

    Source: Wang et al. 2004, a Gaussian window of 11 x 11 pixels with standard deviation 1.5; computed by torchmetrics.
    """

    higher_is_better = True
    relative_tolerance = None
    absolute_tolerance = 0.02
    compares = True

    def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
        """Pictures (n, C, H, W) of both runs.

        Raises:
            ToolchainError: they cannot be paired, are smaller than the window, or torchmetrics is not installed.
        """
        ours, theirs = candidate.pictures, original.pictures
        if ours.shape != theirs.shape or not ours.size or ours.ndim != 4:
            raise ToolchainError(f"pictures of shapes {theirs.shape} and {ours.shape} cannot be compared one by one")
        if min(ours.shape[2:]) < SMALLEST:
            raise ToolchainError(f"pictures of {ours.shape[2]} x {ours.shape[3]} are smaller than SSIM's window of 11")
        image = require("torchmetrics.functional.image", extra="metrics")
        torch = require("torch", extra="metrics")
        pair = [torch.from_numpy(np.asarray(each, np.float64).clip(*RANGE)) for each in (ours, theirs)]
        values = image.structural_similarity_index_measure(*pair, data_range=RANGE, reduction="none")
        return float(values.mean())
