"""Scales of activations from what calibration saw."""

from __future__ import annotations

import pytest
import torch

from enginewright.passes.quantization import scales
from enginewright.passes.quantization.scales import scale_of


def test_a_percentile_is_of_all_calls_and_not_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "MOST_VALUES", 100)
    x = torch.cat([torch.full((50, 10), 0.1), torch.full((50, 10), 1.0)])  # later calls are larger
    assert scale_of(x, observer="percentile", percentile=90) == pytest.approx(1 / 127, rel=1e-4)
    assert scale_of(x, observer="percentile", percentile=55) == pytest.approx(1 / 127, rel=1e-4)
    assert scale_of(x, observer="max", percentile=90) == pytest.approx(1 / 127, rel=1e-4)
    assert scale_of(x[:50], observer="percentile", percentile=90) == pytest.approx(0.1 / 127, rel=1e-4)
