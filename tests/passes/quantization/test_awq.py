from __future__ import annotations

import torch

from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.quantization.awq import awq_factors, errors


def seen(x: torch.Tensor) -> InputStatistics:
    """What is known of an input (R, K)."""
    statistics = InputStatistics(0)
    statistics.add(x)
    return statistics


def test_an_outlying_input_is_served_better_than_by_rounding_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(64, 16, generator=generator)
    x[:, 5] *= 40
    s = awq_factors([weight], [seen(x)], "int4", 32)
    assert s is not None
    assert s.argmax() == 5
    assert errors([weight], [x], s, "int4", 32) < 0.5 * errors([weight], [x], None, "int4", 32)


def test_where_nothing_helps_nothing_is_divided() -> None:
    x = torch.ones(8, 32)
    weight = torch.full((32, 4), 7.0)  # whole codes of scale 1: no error to mend
    assert awq_factors([weight], [seen(x)], "int4", 32) is None


def test_layers_that_read_the_same_are_never_worse_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator) * torch.logspace(-1, 1, 32)
    matrices = [torch.randn(32, 8, generator=generator) for _ in range(2)]
    s = awq_factors(matrices, [seen(x), seen(x)], "int4", 16)
    assert errors(matrices, [x, x], s, "int4", 16) <= errors(matrices, [x, x], None, "int4", 16)
