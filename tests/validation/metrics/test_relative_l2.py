import numpy as np
import pytest

from enginewright.validation.metrics.relative_l2 import RelativeL2


def test_the_error_is_divided_by_the_original_not_by_the_candidate():
    original, candidate = np.array([[3.0, 4.0]]), np.array([[0.0, 0.0]])
    assert RelativeL2().measure(original, candidate) == 1.0
    assert RelativeL2().measure(original, 3 * original) == 2.0


def test_scaling_both_changes_nothing():
    a, b = np.array([1.0, -2.0, 0.5]), np.array([1.1, -1.9, 0.7])
    assert RelativeL2().measure(1000 * a, 1000 * b) == pytest.approx(RelativeL2().measure(a, b), rel=1e-12)


def test_beside_an_original_of_zeros_any_error_is_infinite_and_none_is_none():
    assert RelativeL2().measure(np.zeros(2), np.zeros(2)) == 0.0
    assert RelativeL2().measure(np.zeros(2), np.array([0.0, 1e-9])) == np.inf
