import numpy as np

from enginewright.validation.metrics.max_abs import MaxAbs


def test_the_largest_difference_counts_whatever_its_sign():
    assert MaxAbs().measure(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.5, 2.0], [0.0, 4.0]])) == 3.0


def test_symmetric():
    a, b = np.array([1.0, -2.0]), np.array([4.0, 0.0])
    assert MaxAbs().measure(a, b) == MaxAbs().measure(b, a) == 3.0


def test_an_infinity_is_infinitely_far():
    assert MaxAbs().measure(np.zeros(2), np.array([0.0, -np.inf])) == np.inf
