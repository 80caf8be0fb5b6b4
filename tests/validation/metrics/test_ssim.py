import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.metrics.ssim import Ssim


@pytest.fixture
def pictures():
    return np.random.default_rng(0).uniform(-1, 1, (4, 1, 16, 16)).astype(np.float32)


def test_equal_pictures_are_1_and_noise_lowers_it(task, drawn, pictures):
    noise = np.random.default_rng(1).normal(size=pictures.shape)
    values = [Ssim().measure(task, drawn(pictures), drawn(pictures + size * noise)) for size in (0.0, 0.1, 1.0)]
    assert values[0] == pytest.approx(1.0)
    assert values[0] > values[1] > values[2]


def test_flat_pictures_differ_by_their_means_alone(task, drawn):
    """(2 a b + c) / (a^2 + b^2 + c), with c = (0.01 * 2)^2."""
    a, b, c = 0.2, 0.6, 4e-4
    flat = np.ones((1, 1, 16, 16))
    value = Ssim().measure(task, drawn(flat * a), drawn(flat * b))
    assert value == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-6)


def test_a_nan_picture_is_not_lost(task, drawn, pictures):
    broken = pictures.copy()
    broken[0, 0, 0, 0] = np.nan
    assert np.isnan(Ssim().measure(task, drawn(pictures), drawn(broken)))


def test_pictures_that_cannot_be_compared_are_refused(task, drawn, pictures):
    with pytest.raises(ToolchainError, match=r"\(4, 1, 16, 16\) and \(2, 1, 16, 16\)"):
        Ssim().measure(task, drawn(pictures), drawn(pictures[:2]))
    small = pictures[..., :8]
    with pytest.raises(ToolchainError, match="16 x 8 are smaller than SSIM's window"):
        Ssim().measure(task, drawn(small), drawn(small))
