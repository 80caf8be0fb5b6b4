"""How near the candidate's sounds are to the original's, sample by sample."""

from __future__ import annotations

import numpy as np

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Array
from enginewright.validation.contract import SoundMetric, SoundTask
from enginewright.validation.statistics import check_pair

CAP_DB = 100.0
"""An error of 1e-5 of the signal, below the rounding of 16-bit sound: no ear hears it.

The cap is set on each sound, so that one that is equal to the last bit (infinite ratio) cannot hide the others.
"""


class SoundSnrDb(SoundMetric):
    """Mean over sounds of 10 log10(sum b^2 / sum (a - b)^2), each at most ``CAP_DB``; equal runs read 100.

    Of models that make the same wave again, such as a vocoder: a shift by one sample counts as noise, and is none to
    an ear. ``mel_distance`` is blind to it.
    """

    higher_is_better = True
    unit = "dB"
    relative_tolerance = None
    absolute_tolerance = 1.0  # 1 dB is 12 % of the error's size

    def measure(self, task: SoundTask, original: Array, candidate: Array) -> float:
        """Sounds (n, S) of both, from the same inputs.

        Raises:
            ToolchainError: they cannot be paired, or one of the original's is silent.
        """
        check_pair("sounds", original, candidate)
        wanted, found = original.astype(np.float64), candidate.astype(np.float64)
        signal = np.square(wanted).sum(axis=1)  # (n,)
        if not signal.all():
            raise ToolchainError("a sound of the original is silent: there is no signal beside the noise")
        with np.errstate(divide="ignore"):
            ratio = 10 * np.log10(signal / np.square(found - wanted).sum(axis=1))  # (n,)
        return float(np.minimum(ratio, CAP_DB).mean())
