from __future__ import annotations

import numpy as np
import pytest

from enginewright.ground.signature import Array
from enginewright.validation.contract import SoundTask


@pytest.fixture
def sound_task() -> SoundTask:
    """Sounds at 8 kHz: frames of 320 samples, one for each 80."""
    return SoundTask(sample=lambda runner, n, seed: np.zeros((n, 800)), samples=2, rate=8_000)


@pytest.fixture
def sounds() -> Array:
    """Two seconds of noise, one loud and one soft, of a size that float32 holds."""
    noise = np.random.default_rng(0).normal(size=(2, 8_000))
    return (noise * [[0.2], [0.02]]).astype(np.float32)
