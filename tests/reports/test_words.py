from __future__ import annotations

import pytest

from enginewright.reports import words


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (1.234e-7, "1.23e-07"), (0.0123456, "0.0123"), (12.3456, "12.3"), (1.5e7, "1.50e+07")]
)
def test_nothing_small_reads_as_zero(value: float, said: str) -> None:
    assert words.number(value) == said


def test_a_cosine_near_1_is_told_from_1() -> None:
    assert words.cosine(1.0) == "1"
    assert words.cosine(0.9999969) == "1 - 3.1e-06"
    assert words.cosine(0.5) == "0.500"


def test_sizes_amounts_and_absence() -> None:
    assert words.size(11_389_312) == "11.4 MB"
    assert words.size(None) == words.amount(None) == "not measured"
    assert words.amount(675_129_632) == "675 M"
    assert words.change(200, 150) == "-25.0%"
    assert words.listing(["a", "b", "c"]) == "a, b and c"


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ((0.6347, 0.6121, 0.6622), "1.58x faster than it (1.51x to 1.63x)"),
        ((7.8e-4, 1.2e-4, 0.33), "1282x faster than it (3.03x to 8333x)"),
        ((1.3, 1.2, 1.4), "1.30x slower than it (1.20x to 1.40x)"),
        ((0.99, 0.9, 1.1), "no measurable difference from it: 0.99 (0.90 to 1.10) of its time"),
        ((0.5, 0.0, 0.7), "no measurable difference from it: 0.50 (0 to 0.70) of its time"),
    ],
)
def test_a_ratio_is_said_as_people_say_it(ratio: tuple[float, float, float], said: str) -> None:
    assert words.times(*ratio, "it") == said


def test_8_bits_that_bring_nothing_over_fp32_are_said_to() -> None:
    assert words.beside_fp32(0.5) == "2.00x faster than the same graph in fp32 in the same runtime"
    assert words.beside_fp32(1.09).startswith("NOT faster than the same graph in fp32")
    assert words.beside_fp32(1.0).startswith("NOT faster")
