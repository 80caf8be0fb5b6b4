import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.metrics.frechet_distance import FrechetDistance


def test_a_shifted_cloud_is_as_far_as_its_shift_squared(task, drawn, cloud):
    shifted = drawn(features=cloud + np.array([3.0, 0.0, -4.0]))
    assert FrechetDistance().measure(task, drawn(), shifted) == pytest.approx(25.0, rel=1e-9)


def test_the_original_run_does_not_count(task, drawn, cloud):
    far, near = drawn(features=cloud + 10), drawn(features=cloud)
    assert FrechetDistance().measure(task, far, near) == pytest.approx(0.0, abs=1e-9)


def test_fewer_samples_than_the_floor_are_refused_with_the_way_out(task, drawn, cloud):
    with pytest.raises(ToolchainError, match=r"49 samples.*at least 50") as caught:
        FrechetDistance().measure(task, drawn(), drawn(features=cloud[:49]))
    assert caught.value.help == "draw more: samples = 100"
    FrechetDistance().measure(task, drawn(), drawn(features=cloud[:50]))
