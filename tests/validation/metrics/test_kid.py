import sys
from dataclasses import replace

import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.validation.metrics import kid
from enginewright.validation.metrics.frechet_distance import FrechetDistance
from enginewright.validation.metrics.kid import Kid


def by_hand(a, b):
    """The unbiased estimate of both clouds' discrepancy, all of them at once."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n = len(a)
    same = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (a, b))
    return same - 2 * kernel(a, b).mean()


def test_the_estimate_is_the_definitions(task, drawn, cloud):
    ours = cloud[::-1] * 1.5 + 0.3
    assert Kid().measure(task, drawn(), drawn(features=ours)) == pytest.approx(by_hand(cloud, ours), rel=1e-9)


def test_its_mean_does_not_depend_on_the_number_of_samples(task, drawn):
    """Of clouds of one distribution it is 0, where the Frechet distance of fewer samples is larger."""
    rng = np.random.default_rng(3)

    def means(n):
        both = [[rng.normal(size=(n, 3)) / 2 for _ in range(2)] for _ in range(100)]
        found = [(replace(task, real=real, floor=2), drawn(features=ours)) for real, ours in both]
        return [
            np.mean([metric.measure(each, drawn(), run) for each, run in found])
            for metric in (Kid(), FrechetDistance())
        ]

    few, many = means(10), means(150)
    assert abs(few[0] - many[0]) < 0.03
    assert few[1] - many[1] > 0.1


def test_more_samples_than_a_block_are_taken_block_by_block(task, drawn, cloud, monkeypatch):
    whole = Kid().measure(task, drawn(), drawn(features=cloud + 1))
    monkeypatch.setattr(kid, "BLOCK", 70)
    assert Kid().measure(task, drawn(), drawn(features=cloud + 1)) == pytest.approx(whole, rel=0.3)


def test_what_cannot_be_measured_is_said(task, drawn, cloud, monkeypatch):
    with pytest.raises(ToolchainError, match="1 samples; the kernel distance needs at least 2"):
        Kid().measure(task, drawn(), drawn(features=cloud[:1]))
    assert np.isnan(Kid().measure(task, drawn(), drawn(features=cloud * np.nan)))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(UnavailableError) as caught:
        Kid().measure(task, drawn(), drawn(features=cloud))
    assert "enginewright[metrics]" in caught.value.help
