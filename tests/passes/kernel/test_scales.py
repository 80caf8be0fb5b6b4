"""Scales of activations from what calibration saw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from enginewright.passes.kernel import scales
from enginewright.passes.kernel.scales import scale_of, unusable
from enginewright.passes.kernel.statistics import InputStatistics


def seen(*calls: Tensor, most: int = 1024) -> InputStatistics:
    """What is known of an input after these calls."""
    statistics = InputStatistics(0, histogram=True, most=most)
    for call in calls:
        statistics.add(call)
    return statistics


def test_a_percentile_is_of_all_calls_and_not_of_the_first() -> None:
    small, large = torch.full((50, 10), 0.1), torch.full((50, 10), 1.0)
    both, first = seen(small, large, most=5), seen(small, most=5)
    assert scale_of(both, observer="percentile", percentile=90) == pytest.approx(1 / 127, rel=1e-3)
    assert scale_of(both, observer="percentile", percentile=55) == pytest.approx(1 / 127, rel=1e-3)
    assert scale_of(both, observer="percentile", percentile=45) == pytest.approx(0.1 / 127, rel=1e-3)
    assert scale_of(both, observer="max", percentile=90) == pytest.approx(1 / 127, rel=1e-6)
    assert scale_of(first, observer="percentile", percentile=90) == pytest.approx(0.1 / 127, rel=1e-3)


@pytest.mark.parametrize("smoothed", [False, True])
def test_one_outlier_a_call_does_not_pull_a_percentile(smoothed: bool) -> None:
    """A row of outliers among 2,000: 0.05 % of the values, which a percentile of 99.9 is there to ignore."""
    calls = []
    for _ in range(4):
        x = torch.rand(2000, 8, generator=torch.Generator().manual_seed(0))
        x[700] = 50
        calls.append(x)
    s = torch.ones(8) if smoothed else None
    assert scale_of(seen(*calls), observer="percentile", percentile=99.8, s=s) < 1.01 / 127
    assert scale_of(seen(*calls), observer="max", percentile=99.8, s=s) == pytest.approx(50 / 127, rel=1e-5)


def test_a_scale_after_smoothing_is_that_of_the_smoothed_input() -> None:
    x, s = torch.randn(300, 8), torch.tensor([4.0, *[1.0] * 7])
    x[:, 0] *= 20
    for observer in ("max", "percentile", "mse"):
        one = scale_of(seen(x), observer=observer, percentile=99.9, s=s)
        assert one == pytest.approx(scale_of(seen(x / s), observer=observer, percentile=99.9), rel=2e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_seen_in_whatever_row(bad: float) -> None:
    x = torch.ones(5000, 4)
    x[3333, 2] = bad
    assert "not finite" in unusable(seen(x))
    assert "zero" in unusable(seen(torch.zeros(4, 4)))
    assert "no rows" in unusable(seen(torch.zeros(0, 4)))
    assert not unusable(seen(torch.ones(4, 4)))


def test_a_large_layer_is_judged_by_some_of_its_outputs_and_a_small_one_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 32, generator=generator), torch.randn(5000, 32, generator=generator)
    x[0] *= 100  # one scale for all rows is too coarse
    few = scales.arithmetic(x, weight)
    monkeypatch.setattr(scales, "OUTPUTS", 10_000)
    assert len(scales.some_outputs(weight)) == 5000
    every = scales.arithmetic(x, weight)
    assert (few["rows"], few["reduced_range"]) == (every["rows"], every["reduced_range"])
    assert few["rows"]
    assert few["saturating_share"] == pytest.approx(every["saturating_share"], rel=0.05)
    monkeypatch.setattr(scales, "OUTPUTS", 2)
    assert torch.equal(scales.some_outputs(weight), weight[[0, -1]])
