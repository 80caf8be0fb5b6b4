from __future__ import annotations

import numpy as np
import pytest

from enginewright.ground.signature import Array
from enginewright.validation.contract import Drawn, SamplingTask


@pytest.fixture
def cloud() -> Array:
    """200 features of width 3 with unequal variances."""
    return np.random.default_rng(0).normal(size=(200, 3)) * [1.0, 2.0, 0.5]


@pytest.fixture
def task(cloud: Array) -> SamplingTask:
    """Judges nothing itself: the real features are ``cloud``, the classes asked for count up to 3."""
    again = np.random.default_rng(1).normal(size=(150, 3)) * [1.0, 2.0, 0.5]
    return SamplingTask(
        sample=lambda runner, n, seed: np.zeros((n, 1, 2, 2)),
        asked=lambda n: np.arange(n) % 3,
        read=lambda pictures: (np.zeros(len(pictures)), np.zeros((len(pictures), 3))),
        real=cloud,
        real_again=again,
        samples=100,
        floor=50,
    )


@pytest.fixture
def drawn():
    """(pictures, classes, features) -> what a run drew; empty where a test does not look."""

    def build(pictures: object = (), classes: object = (), features: object = ()) -> Drawn:
        return Drawn(pictures=np.asarray(pictures), classes=np.asarray(classes), features=np.asarray(features))

    return build
