import numpy as np
import pytest

from enginewright.validation.metrics.cosine import Cosine
from enginewright.validation.metrics.relative_l2 import RelativeL2
from enginewright.validation.metrics.worst_column import WorstColumn


def worst(original, candidate):
    return WorstColumn().measure(np.asarray(original, np.float64), np.asarray(candidate, np.float64))


def boxes_and_scores():
    """64 rows of a detector: four coordinates in pixels, three scores from 0 to 1."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.uniform(0, 640, (64, 4)), rng.uniform(0, 1, (64, 3))], axis=1)


def test_three_dead_columns_of_seven_that_whole_tensor_figures_do_not_see():
    original = boxes_and_scores()
    blind = original * [1, 1, 1, 1, 0, 0, 0]
    assert Cosine().measure(original, blind) > 0.999998
    assert RelativeL2().measure(original, blind) < 0.002
    assert worst(original, blind) == pytest.approx(1)


def test_by_hand():
    original = np.tile([[3.0, 100.0]], (8, 1))
    assert worst(original, original + np.array([0.3, 1.0])) == pytest.approx(0.1)
    assert worst(original, original) == 0


def test_the_order_of_rows_and_columns_is_nothing_to_it():
    rng = np.random.default_rng(0)
    original, candidate = rng.normal(size=(2, 9, 5))
    rows, places = rng.permutation(9), rng.permutation(5)
    assert worst(original[rows][:, places], candidate[rows][:, places]) == pytest.approx(worst(original, candidate))


def test_rounding_in_a_column_near_zero_is_no_error():
    original = boxes_and_scores() * [1, 1, 1, 1, 1, 1, 1e-9]
    assert worst(original, original + 640 * 6e-8) < 0.005


def test_one_row_has_elements_near_zero_by_chance_and_they_do_not_explode():
    rng = np.random.default_rng(0)
    original = rng.normal(size=(1, 1000))
    assert worst(original, original + 0.01 * rng.normal(size=original.shape)) < 0.05


def test_a_channel_of_pictures_counts_like_a_column():
    original = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    dead = original * np.array([1, 0, 1])[:, None, None]
    assert worst(original, dead) == pytest.approx(1)


def test_only_the_original_zero_is_infinite():
    assert worst(np.zeros((9, 2)), np.ones((9, 2))) == np.inf
