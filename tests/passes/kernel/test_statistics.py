"""Streaming statistics against the same of all rows kept together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from enginewright.passes.kernel.statistics import (
    Histogram,
    LargestRow,
    Magnitudes,
    Products,
    SampledRows,
    Squares,
    rows_of,
)


@pytest.fixture
def parts() -> list[Tensor]:
    """Calls of different lengths and sizes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 6, generator=generator) * scale for rows, scale in ((5, 1.0), (40, 0.1), (1, 3.0))]


def test_sums_are_those_of_all_rows(parts: list[Tensor]) -> None:
    products, squares, sizes = Products(), Squares(), Magnitudes()
    for part in parts:
        for statistic in (products, squares, sizes):
            statistic.add(part)
    x = torch.cat(parts)
    torch.testing.assert_close(products.total, x.double().T @ x.double())
    torch.testing.assert_close(squares.total, x.double().square().sum(0))
    assert torch.equal(sizes.largest, x.abs().amax(0))
    torch.testing.assert_close(sizes.mean, x.abs().mean(0))
    assert sizes.rows == 46


def test_a_value_that_is_not_finite_is_found_in_any_call(parts: list[Tensor]) -> None:
    for bad in (float("nan"), float("inf")):
        sizes = Magnitudes()
        for number, part in enumerate(parts):
            sizes.add(part.index_fill(1, torch.tensor([2]), bad) if number == 1 else part)
        assert sizes.largest.isfinite().tolist() == [True, True, False, True, True, True]


def test_a_sample_is_all_rows_while_they_are_few_and_in_order(parts: list[Tensor]) -> None:
    sample = SampledRows(0, most=46)
    for part in parts:
        sample.add(part)
    assert torch.equal(sample.rows, torch.cat(parts))


def test_every_row_of_every_call_has_the_same_chance() -> None:
    """Calls of 1, 10 and 89 rows: each row is in about 20 % of many samples, wherever it comes."""
    times = torch.zeros(100)
    for seed in range(2000):
        sample = SampledRows(seed, most=20)
        for part in torch.arange(100.0)[:, None].split([1, 10, 89]):
            sample.add(part)
        assert len(sample.rows) == 20
        times[sample.rows.flatten().long()] += 1
    assert (times / 2000 - 0.2).abs().max() < 0.045  # five standard deviations
    assert (times[:11].mean() / 2000 - 0.2).abs() < 0.01


def test_samples_of_one_seed_take_the_same_rows() -> None:
    one, other, third = SampledRows(3, most=8), SampledRows(3, most=8), SampledRows(4, most=8)
    for part in torch.arange(60.0)[:, None].split(20):
        one.add(part)
        other.add(-part)
        third.add(part)
    assert torch.equal(one.rows, -other.rows)
    assert not torch.equal(one.rows, third.rows)


def test_the_largest_row_is_found_wherever_it_is(parts: list[Tensor]) -> None:
    largest, x = LargestRow(), torch.cat(parts)
    for part in parts:
        largest.add(part)
    assert torch.equal(largest.row[0], x[x.abs().amax(1).argmax()])


@pytest.mark.parametrize("percent", [50, 90, 99, 99.99, 100])
def test_a_percentile_is_of_all_values_of_all_calls(percent: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(100, 300, generator=generator) * scale for scale in (0.01, 1.0, 7.0)]
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    wanted = torch.quantile(torch.cat(parts).abs().flatten().double(), percent / 100)
    assert histogram.percentile(percent) == pytest.approx(float(wanted), rel=1.5e-3)


def test_a_percentile_of_zeros_and_of_nothing_is_zero() -> None:
    histogram = Histogram()
    assert histogram.percentile(99) == 0
    histogram.add(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert histogram.percentile(50) == 0
    assert histogram.percentile(100) == pytest.approx(5, rel=1e-3)


def test_rows_are_all_leading_dimensions_together() -> None:
    assert rows_of(torch.ones(2, 3, 4)).shape == (6, 4)
    assert rows_of(torch.ones(4)).shape == (1, 4)
