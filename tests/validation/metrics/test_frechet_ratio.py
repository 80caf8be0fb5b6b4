from dataclasses import replace

import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.metrics.frechet_ratio import FrechetRatio
from enginewright.validation.statistics import frechet_distance


def test_as_many_other_real_pictures_score_1(task, drawn):
    assert FrechetRatio().measure(task, drawn(), drawn(features=task.real_again[:80])) == 1.0


def test_the_floor_is_taken_at_the_number_of_samples(task, drawn, cloud):
    features = task.real_again[:100] + np.array([1.0, 0.0, 0.0])
    floor = frechet_distance(task.real_again[:100], cloud)
    expected = frechet_distance(features, cloud) / floor
    assert FrechetRatio().measure(task, drawn(), drawn(features=features)) == pytest.approx(expected)
    assert floor != frechet_distance(task.real_again, cloud)


def test_too_few_samples_are_refused(task, drawn, cloud):
    with pytest.raises(ToolchainError, match=r"20 samples.*at least 50"):
        FrechetRatio().measure(task, drawn(), drawn(features=cloud[:20]))


def test_too_few_real_pictures_are_refused(task, drawn, cloud):
    with pytest.raises(ToolchainError, match="160 samples, but only 150 other real"):
        FrechetRatio().measure(task, drawn(), drawn(features=cloud[:160]))


def test_a_floor_of_0_is_refused(task, drawn, cloud):
    constant = cloud * 0
    with pytest.raises(ToolchainError, match="floor of 0"):
        FrechetRatio().measure(replace(task, real=constant, real_again=constant), drawn(), drawn(features=cloud[:60]))
