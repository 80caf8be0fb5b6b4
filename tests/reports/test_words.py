from __future__ import annotations

import pytest

from reports import words


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (1.234e-7, "1.23e-07"), (0.0123456, "0.0123"), (12.3456, "12.3"), (1.5e7, "1.50e+07")]
)
def test_nothing_small_reads_as_zero(value: float, said: str) -> None:
    assert words.number(value) == said


def test_a_cosine_near_1_is_told_from_1() -> None:
    assert words.cosine(1.0) == "1"
    assert words.cosine(0.9999969) == "1 - 3.1e-06"
    assert words.cosine(0.5) == "0.500"


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.5, 0.7, "faster"), (1.1, 1.4, "slower"), (0.9, 1.1, "no measurable difference")]
)
def test_an_interval_that_holds_1_claims_nothing(low: float, high: float, said: str) -> None:
    assert words.ratio_phrase((low + high) / 2, low, high).startswith(said)


def test_sizes_amounts_and_absence() -> None:
    assert words.size(11_389_312) == "11.4 MB"
    assert words.size(None) == words.amount(None) == "not measured"
    assert words.amount(675_129_632) == "675 M"
    assert words.change(200, 150) == "-25.0%"
    assert words.listing(["a", "b", "c"]) == "a, b and c"
