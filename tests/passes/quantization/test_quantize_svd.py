from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from enginewright.passes.contract import Context
from enginewright.passes.quantization.quantize_svd import BranchedLinear, QuantizeSvd, largest_directions
from enginewright.passes.quantization.quantize_weights import QuantizeWeights
from tests.passes.conftest import SUBJECTS
from tests.passes.quantization.formats import (
    KINDS,
    builds_in_tensorrt_rtx,
    exported,
    in_onnxruntime,
    relative,
    weight_types,
)


def layer_and_inputs() -> tuple[nn.Module, torch.Tensor]:
    """A weight with four strong directions, and inputs with an outlying channel."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 64)
    strong = torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    with torch.no_grad():
        linear.weight.copy_(strong + 0.05 * torch.randn(64, 64, generator=generator))
    x = torch.randn(32, 64, generator=generator)
    x[:, 9] *= 30
    return nn.Sequential(linear).eval(), x


def test_branch_and_residual_are_the_layer_before_rounding() -> None:
    net, x = layer_and_inputs()
    down, up = largest_directions(net[0].weight, 4)
    rest = nn.Linear(64, 64)
    with torch.no_grad():
        rest.weight.copy_(net[0].weight - up @ down)
        rest.bias.copy_(net[0].bias)
    torch.testing.assert_close(BranchedLinear(down, up, rest, None)(x), net(x), rtol=1e-4, atol=1e-4)
    assert rest.weight.norm() < 0.1 * net[0].weight.norm(), "the strong directions are in the branch"


def test_the_branch_takes_what_4_bits_lose() -> None:
    net, x = layer_and_inputs()
    wanted, context = net(x).detach(), Context(calibration=[{"input": x}])
    plain = QuantizeWeights(block=64).apply(copy.deepcopy(net), context).model
    branched = QuantizeSvd(rank=4, activations="none").apply(copy.deepcopy(net), context).model
    assert relative(branched(x), wanted) < 0.2 * relative(plain(x), wanted)


def test_more_directions_and_more_bits_cost_less_error() -> None:
    net, x = layer_and_inputs()
    wanted, context = net(x).detach(), Context(calibration=[{"input": x}])

    def error(**parameters: object) -> float:
        step = QuantizeSvd(activations="none", **parameters)
        return relative(step.apply(copy.deepcopy(net), context).model(x), wanted)

    assert error(rank=4) < error(rank=1)
    assert error(rank=1, residual="int8") < error(rank=1)


def test_a_branch_is_at_most_a_quarter_and_blocks_are_whole() -> None:
    net, x = layer_and_inputs()
    context = Context(calibration=[{"input": x}])
    assert QuantizeSvd().plan(net, context).choice["0"].rank == 16
    assert "no multiple of the block of 48" in QuantizeSvd(block=48).plan(net, context).skipped["0"]


@pytest.mark.parametrize("residual", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_it_runs_in_onnxruntime_as_in_pytorch_and_builds_in_tensorrt_rtx(
    name: str, residual: str, tmp_path: Path
) -> None:
    subject = SUBJECTS[name]()
    before = subject.output(subject.model)
    step = QuantizeSvd(rank=4, block=16, residual=residual)
    result = step.apply(subject.copy(), Context(calibration=[subject.inputs]))
    here = subject.output(result.model)
    assert 0.001 < relative(here, before) < 0.3
    graph = exported(subject, result.model, tmp_path / "model.onnx")
    assert weight_types(graph.path) == {onnx.TensorProto.INT4 if residual == "int4" else onnx.TensorProto.INT8}
    assert relative(in_onnxruntime(graph), here) < 0.03
    pytest.importorskip("tensorrt_rtx")
    assert builds_in_tensorrt_rtx(graph)
