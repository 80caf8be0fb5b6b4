import numpy as np

from enginewright.validation.metrics.mean_abs import MeanAbs


def test_differences_of_both_signs_add_up():
    assert MeanAbs().measure(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0, 1.0], [3.0, 0.0]])) == 1.5


def test_symmetric_and_never_above_the_largest():
    a, b = np.array([1.0, -2.0, 5.0]), np.array([4.0, 0.0, 5.0])
    assert MeanAbs().measure(a, b) == MeanAbs().measure(b, a) == 5 / 3
