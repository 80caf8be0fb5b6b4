import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.metrics.psnr_db import PsnrDb


@pytest.fixture
def pictures():
    return np.random.default_rng(0).uniform(-1, 1, (4, 1, 3, 3)).astype(np.float32)


def test_the_mean_is_of_decibels_not_of_errors(task, drawn):
    """An error of 0.2 against a range of 2 is 20 dB, one of 0.02 is 40 dB."""
    original = np.zeros((2, 1, 2, 2))
    candidate = original + np.array([0.2, 0.02]).reshape(2, 1, 1, 1)
    assert PsnrDb().measure(task, drawn(original), drawn(candidate)) == pytest.approx(30.0)


def test_equal_runs_read_the_cap(task, drawn, pictures):
    assert PsnrDb().measure(task, drawn(pictures), drawn(pictures)) == 100.0


def test_one_equal_picture_does_not_hide_the_others(task, drawn):
    original = np.zeros((2, 1, 2, 2))
    candidate = original + np.array([0.0, 0.2]).reshape(2, 1, 1, 1)
    assert PsnrDb().measure(task, drawn(original), drawn(candidate)) == pytest.approx((100 + 20) / 2)


def test_a_nan_picture_is_not_capped_away(task, drawn, pictures):
    broken = pictures.copy()
    broken[0, 0, 0, 0] = np.nan
    assert np.isnan(PsnrDb().measure(task, drawn(pictures), drawn(broken)))


def test_pictures_of_another_shape_are_refused(task, drawn, pictures):
    with pytest.raises(ToolchainError, match=r"\(4, 1, 3, 3\) and \(2, 1, 3, 3\)"):
        PsnrDb().measure(task, drawn(pictures), drawn(pictures[:2]))
