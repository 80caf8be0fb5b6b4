from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.quantization.fp8 import Fp8Linear
from enginewright.passes.quantization.quantize_fp8 import QuantizeFp8
from tests.passes.conftest import SUBJECTS, Subject
from tests.passes.quantization.formats import (
    KINDS,
    builds_in_tensorrt_rtx,
    exported,
    in_onnxruntime,
    relative,
    weight_types,
)


def rounded(values: list[float]) -> list[float]:
    """E4M3 by hand: 3 bits after the leading one, largest 448, steps of 2**-9 below 2**-6."""
    found = []
    for value in values:
        magnitude = abs(value)
        exponent = max(-6, torch.tensor(magnitude).log2().floor().int().item()) if magnitude else -6
        step = 2.0 ** (exponent - 3)
        found.append(min(round(magnitude / step) * step, 448.0) * (1 if value >= 0 else -1))
    return found


def test_weights_and_inputs_are_rounded_as_by_hand() -> None:
    linear = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[448.0, 0.3, -17.7]]))
    layer = Fp8Linear(linear, 0.5)
    assert layer.weight_scale.tolist() == [1.0]
    assert layer.weight.float().flatten().tolist() == rounded([448.0, 0.3, -17.7])
    x = torch.tensor([[1.07, -300.0, 0.001]])
    wanted = torch.tensor(rounded([2.14, -600.0, 0.002])) * 0.5
    torch.testing.assert_close(layer(x).flatten()[0], wanted @ layer.weight.float().flatten())


def test_a_row_of_zeros_has_a_scale_that_divides() -> None:
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight[0] = 0
    assert Fp8Linear(linear, 1.0).weight_scale[0] == 1
    assert Fp8Linear(linear, 1.0)(torch.randn(3, 4)).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_it_runs_in_onnxruntime_as_in_pytorch_and_builds_in_tensorrt_rtx(name: str, tmp_path: Path) -> None:
    subject: Subject = SUBJECTS[name]()
    before = subject.output(subject.model)
    result = QuantizeFp8().apply(subject.copy(), Context(calibration=[subject.inputs]))
    here = subject.output(result.model)
    assert 0.001 < relative(here, before) < 0.15
    graph = exported(subject, result.model, tmp_path / "model.onnx")
    assert weight_types(graph.path) == {onnx.TensorProto.FLOAT8E4M3FN}
    assert relative(in_onnxruntime(graph), here) < 0.02  # a value at the edge between two codes may fall on either side
    pytest.importorskip("tensorrt_rtx")
    assert builds_in_tensorrt_rtx(graph)


def test_the_scale_is_the_largest_value_over_448_and_a_percentile_clips() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64)), torch.rand(100, 64)
    x[0, 0] = 50
    context = Context(calibration=[{"input": x}])
    assert QuantizeFp8().plan(net, context).choice["0"].input_scale == pytest.approx(50 / 448, rel=1e-5)
    clipped = QuantizeFp8(observer="percentile", percentile=99).plan(net, context).choice["0"].input_scale
    assert clipped < 1 / 448


def test_what_is_left_alone_has_a_reason() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2), nn.Conv1d(1, 1, 1))
    net.forward = lambda x: net[1](net[0](x))  # type: ignore[method-assign]
    plan = QuantizeFp8(exclude=("0",)).plan(net, Context(calibration=[{"x": torch.rand(4, 64)}]))
    assert not plan.choice
    assert "'0'" in plan.skipped["0"]
    assert "128 weights" in plan.skipped["1"]
    assert "only linear" in plan.skipped["2"]


def test_an_observer_that_it_lacks_is_quoted() -> None:
    with pytest.raises(ToolchainError, match="'mse'"):
        QuantizeFp8(observer="mse")
