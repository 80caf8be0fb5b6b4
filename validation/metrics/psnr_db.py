"""How near the candidate's pictures are to those that the original draws from the same noise."""

from __future__ import annotations

import numpy as np

from enginewright.validation.contract import Drawn, SampleMetric, SamplingTask
from enginewright.validation.statistics import check_pair, difference

RANGE = 2.0
"""Pictures live in [-1, 1]."""

CAP_DB = 100.0
"""A root mean square error of 2e-5, 1/400 of a step of an 8-bit picture: nothing above it can be seen.

The cap is set on each picture, so that one picture equal to the last bit (infinite PSNR) cannot hide the others.
"""


class PsnrDb(SampleMetric):
    """Mean over samples of 10 log10(RANGE^2 / mean squared error), each at most ``CAP_DB``; equal runs read 100."""

    higher_is_better = True
    unit = "dB"
    relative_tolerance = None
    absolute_tolerance = 1.0  # 1 dB is 12 % of the error's size
    compares = True

    def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
        """Pictures (n, C, H, W) of both runs, drawn from the same noise."""
        ours, theirs = candidate.pictures, original.pictures
        check_pair("pictures", theirs, ours)
        errors = difference(theirs, ours).reshape(len(ours), -1)  # (n, C * H * W)
        with np.errstate(divide="ignore"):
            psnr = 10 * np.log10(RANGE**2 / np.square(errors).mean(axis=1))  # (n,)
        return float(np.minimum(psnr, CAP_DB).mean())
