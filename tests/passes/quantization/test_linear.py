from __future__ import annotations

import torch
from torch import nn

from enginewright.passes.kernel.rounding import weight_scales
from enginewright.passes.quantization.linear import QuantizedLinear


def test_integers_times_scales_are_the_product() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    scale = float(x.abs().max()) / 127
    layer = QuantizedLinear(linear, scale)
    weight_scale = linear.weight.abs().amax(1) / 127
    w = (linear.weight / weight_scale[:, None]).round()
    q = (x / scale).round()
    expected = (q @ w.T) * scale * weight_scale + linear.bias
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight.dtype == torch.int8
    assert (layer(x) - linear(x)).norm() / linear(x).norm() < 0.02


def test_the_linear_layer_it_came_from_is_untouched() -> None:
    linear = nn.Linear(4, 4)
    before = linear.weight.clone()
    QuantizedLinear(linear, 0.1)
    assert torch.equal(linear.weight, before)


def test_a_row_of_zeros_has_a_scale_that_divides() -> None:
    assert weight_scales(torch.zeros(1, 3)).tolist() == [1.0]
