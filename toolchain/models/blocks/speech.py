"""Spoken sentences, for models of voice to be measured on: four voices of espeak-ng, shipped with their texts.

They are formant synthesis, no person's voice. How the recording was made: ``toolchain/training/speech.py``.
"""

from __future__ import annotations

import wave
from functools import cache
from pathlib import Path

import numpy as np

from enginewright.ground.signature import Array

RECORDING = Path(__file__).resolve().parent.parent / "weights" / "speech.wav"
RATE = 24_000
"""Samples a second of the recording."""


@cache
def recording() -> Array:
    """The whole of it, (samples,), in [-1, 1)."""
    with wave.open(str(RECORDING)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.float32) / 2**15


def excerpts(n: int, length: int, seed: int) -> Array:
    """Stretches of the recording that start anywhere, (n, length); behind its end comes its start again."""
    starts = np.random.default_rng(seed).integers(len(recording()), size=(n, 1))
    return recording().take(starts + np.arange(length), mode="wrap")
