"""Which sizes are run at, and what is made of the outcome."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from enginewright.ground.signature import Dim, InputSpec
from enginewright.validation import sizes
from enginewright.validation.inputs import draw

BATCH = Dim(name="batch", low=1, typical=2, high=64)
TIME = Dim(name="time", low=4, typical=12, high=64, multiple_of=4)


def specs(*dims: Dim) -> list[InputSpec]:
    return [InputSpec(name="x", shape=(*dims, 8))]


def test_one_dimension_is_run_at_its_ends_and_at_an_odd_size() -> None:
    assert sizes.combinations(specs(BATCH)) == [{"batch": 1}, {"batch": 3}, {"batch": 64}]


def test_sizes_keep_to_multiples_also_where_the_ends_do_not() -> None:
    d = Dim(name="time", low=3, typical=8, high=30, multiple_of=4)
    assert [one["time"] for one in sizes.combinations(specs(d))] == [4, 12, 28]


@pytest.mark.parametrize("count", [2, 3])
def test_every_pair_of_dimensions_meets_at_both_ends(count: int) -> None:
    dims = [Dim(name=f"d{i}", low=1, typical=4, high=9) for i in range(count)]
    chosen = sizes.combinations(specs(*dims))
    assert len(chosen) <= sizes.MOST
    for a, b in itertools.combinations([d.name for d in dims], 2):
        assert {(1, 1), (1, 9), (9, 1), (9, 9)} <= {(one[a], one[b]) for one in chosen}


def test_a_fixed_shape_and_a_range_of_one_size_ask_for_nothing() -> None:
    assert sizes.combinations([InputSpec(name="x", shape=(2, 3))]) == []
    assert sizes.combinations(specs(Dim(name="batch", low=2, typical=2, high=2))) == []


def test_the_cheapest_come_first() -> None:
    growths = [sizes.growth(specs(BATCH, TIME), one) for one in sizes.combinations(specs(BATCH, TIME))]
    assert growths == sorted(growths)


def test_what_would_take_too_long_or_too_much_is_left_out_with_its_reason() -> None:
    large = {"batch": 64, "time": 64}
    assert sizes.too_large(specs(BATCH, TIME), large, seconds=1e-3, size=100) == ""
    assert "s" in sizes.too_large(specs(BATCH, TIME), large, seconds=1, size=100)
    assert "GB" in sizes.too_large(specs(BATCH, TIME), large, seconds=1e-3, size=10**8)
    assert sizes.too_large(specs(BATCH, TIME), {"batch": 1, "time": 4}, seconds=1, size=10**9) == ""


def test_limits_of_all_dimensions_together() -> None:
    assert sizes.at_limits(specs(BATCH, TIME)) == [
        {"batch": 1, "time": 4},
        {"batch": 2, "time": 12},
        {"batch": 64, "time": 64},
    ]


def test_both_ends_of_integers_are_in_a_call() -> None:
    ids = InputSpec(name="ids", shape=(2, 3), dtype="int64", low=5, high=9)
    changed = sizes.with_ends({"ids": np.full((2, 3), 6)}, [ids])["ids"]
    assert changed.min() == 5
    assert changed.max() == 8


def test_drawn_booleans_hold_both_values_and_hide_no_row_whole() -> None:
    mask = draw([InputSpec(name="keep", shape=(3, 5), dtype="bool")], seed=0)["keep"]
    assert mask.any(axis=-1).all()
    assert not mask.all()
    flags = draw([InputSpec(name="flag", shape=(2,), dtype="bool")], seed=0)["flag"]
    assert set(flags.tolist()) == {True, False}


def test_booleans_with_a_range_keep_to_it() -> None:
    assert draw([InputSpec(name="keep", shape=(3, 5), dtype="bool", low=1, high=2)], seed=0)["keep"].all()


def test_one_row_is_hidden_where_a_mask_has_rows() -> None:
    keep, x = InputSpec(name="keep", shape=(2, 4), dtype="bool"), InputSpec(name="x", shape=(2,))
    call = {"keep": np.ones((2, 4), bool), "x": np.ones(2, np.float32)}
    hidden = sizes.hiding_a_row(call, [keep, x])
    assert hidden is not None
    assert hidden["keep"].tolist() == [[True] * 4, [False] * 4]
    assert call["keep"].all()
    assert sizes.hiding_a_row({"x": call["x"]}, [x]) is None


Y = {"y": np.array([1.0, 2.0], np.float32)}


@pytest.mark.parametrize(
    ("candidate", "typical", "verdict", "reason"),
    [
        ([1.0, 2.0], 0.0, "met", ""),
        ([1.0, 2.1], 1e-7, "missed", "relative error 0.045"),
        ([1.0, 2.1], 0.01, "met", ""),  # an engine in 8 bits is no nearer at typical sizes
        ([1.0, 2.0001], 0.0, "met", ""),
        ([1.0], 0.0, "missed", "shape (1,)"),
        ([1.0, np.nan], 0.0, "missed", "not finite"),
    ],
)
def test_what_is_made_of_an_outcome(candidate: list[float], typical: float, verdict: str, reason: str) -> None:
    found = sizes.outcome({"batch": 1}, Y, {"y": np.array(candidate, np.float32)}, typical)
    assert found.verdict == verdict
    assert reason in found.reason


def test_the_dimension_that_fails_alone_is_to_blame() -> None:
    at, typical = {"batch": 1, "time": 2}, {"batch": 4, "time": 6}
    assert sizes.guilty(at, typical, lambda s: s["time"] == 2) == {"time": 2}
    assert sizes.guilty(at, typical, lambda s: s == at) == at
