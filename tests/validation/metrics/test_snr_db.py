import numpy as np
import pytest

from enginewright.validation.metrics.relative_l2 import RelativeL2
from enginewright.validation.metrics.snr_db import SnrDb


def test_an_error_of_a_tenth_is_20_db():
    assert SnrDb().measure(np.array([10.0, -10.0]), np.array([11.0, -9.0])) == pytest.approx(20.0)


def test_equal_is_infinite_and_an_original_of_zeros_minus_infinite():
    assert SnrDb().measure(np.ones(3), np.ones(3)) == np.inf
    assert SnrDb().measure(np.zeros(3), np.ones(3)) == -np.inf


def test_it_is_relative_l2_in_decibels():
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    assert SnrDb().measure(a, b) == pytest.approx(-20 * np.log10(RelativeL2().measure(a, b)))
