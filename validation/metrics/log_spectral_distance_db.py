"""How many decibels the spectra of sounds are from those of the original's."""

from __future__ import annotations

import numpy as np

from enginewright.ground import spectra
from enginewright.ground.signature import Array
from enginewright.validation.contract import SoundMetric, SoundTask
from enginewright.validation.statistics import Floats, check_pair

QUIETEST_DB = -100.0
"""What is quieter beside a sine of full scale counts as so quiet: no ear hears it, and silence has a level."""


class LogSpectralDistanceDb(SoundMetric):
    """Mean over frames of the root mean square, over frequencies, of the difference of two levels in decibels.

    Source: Gray and Markel 1976, Distance Measures for Speech Processing, IEEE Transactions on Acoustics, Speech and
    Signal Processing 24(5). Blind to phases; a gain of g reads 20 log10 g.
    """

    higher_is_better = False
    unit = "dB"
    absolute_tolerance = 0.1  # a tenth of what a listener can tell of loudness

    def measure(self, task: SoundTask, original: Array, candidate: Array) -> float:
        """Sounds (n, S) of both, from the same inputs; NaN where the candidate's are not finite.

        Raises:
            ToolchainError: they cannot be paired, or are shorter than a frame.
        """
        check_pair("sounds", original, candidate)
        apart = levels_db(task, candidate) - levels_db(task, original)  # (n, K, T)
        return float(np.sqrt(np.square(apart).mean(axis=1)).mean())


def levels_db(task: SoundTask, sounds: Array) -> Floats:
    """How loud each frequency is, (n, K, T), beside a sine of full scale."""
    found = spectra.magnitudes(sounds, window=task.window, hop=task.hop) * 4 / task.window
    return 20 * np.log10(np.maximum(found, 10 ** (QUIETEST_DB / 20)))
