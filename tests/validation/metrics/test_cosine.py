import numpy as np
import pytest

from enginewright.validation.metrics.cosine import Cosine


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [([6.0, 8.0], 1.0), ([-3.0, -4.0], -1.0), ([-4.0, 3.0], 0.0), ([5.0, 0.0], 0.6), ([0.0, 0.0], 0.0)],
)
def test_against_the_vector_3_4(candidate, expected):
    original = np.array([3.0, 4.0])
    assert Cosine().measure(original, np.array(candidate)) == pytest.approx(expected, abs=1e-15)
    assert Cosine().measure(np.array(candidate), original) == pytest.approx(expected, abs=1e-15)


def test_all_dimensions_count_as_one_vector():
    original, candidate = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    assert Cosine().measure(original, candidate) == pytest.approx(0.5)


def test_two_zero_vectors_agree():
    assert Cosine().measure(np.zeros(3), np.zeros(3)) == 1.0


def test_rounding_never_leads_above_1():
    vectors = np.random.default_rng(0).normal(size=(200, 7))
    assert max(Cosine().measure(each, each) for each in vectors) <= 1.0
