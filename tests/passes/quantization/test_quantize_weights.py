from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.quantization.blocks import BlockLinear
from enginewright.passes.quantization.grouping import DividedNorm
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

T = onnx.TensorProto
CASES = [
    ({"weights": "int4", "algorithm": "gptq"}, {T.INT4}, 21),
    ({"weights": "int4", "algorithm": "awq", "activations": "int8"}, {T.INT4}, 21),
    ({"weights": "nvfp4"}, {T.FLOAT4E2M1, T.FLOAT8E4M3FN}, 23),
    pytest.param({"weights": "int8"}, {T.INT8}, 21, marks=pytest.mark.slow),
    pytest.param({"weights": "mxfp8", "block": 32}, {T.FLOAT8E4M3FN}, 21, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("parameters", "types", "opset"), CASES, ids=["int4", "int4 and int8", "nvfp4", "int8", "mxfp8"]
)
@pytest.mark.parametrize("name", KINDS)
def test_it_runs_in_onnxruntime_as_in_pytorch_and_builds_in_tensorrt_rtx(
    name: str, parameters: dict[str, str], types: set[int], opset: int, tmp_path: Path
) -> None:
    subject = SUBJECTS[name]()
    before = subject.output(subject.model)
    step = QuantizeWeights(**{"block": 16, **parameters})
    result = step.apply(subject.copy(), Context(calibration=[subject.inputs]))
    here = subject.output(result.model)
    assert 0.001 < relative(here, before) < 0.3
    graph = exported(subject, result.model, tmp_path / "model.onnx")
    # The activations' pairs read no initializer.
    assert weight_types(graph.path) == types
    assert onnx.load(graph.path, load_external_data=False).opset_import[0].version == opset
    assert relative(in_onnxruntime(graph), here) < 0.02
    pytest.importorskip("tensorrt_rtx")
    assert builds_in_tensorrt_rtx(graph)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.odd = nn.Linear(72, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(self.norm(x))))


def context() -> Context:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 30
    return Context(calibration=[{"x": x}])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        made.norm.weight[7] = 20
    return made


def test_rounding_alone_needs_no_data_and_leaves_what_has_no_whole_blocks(net: Net) -> None:
    result = QuantizeWeights().apply(net, Context())
    assert result.changed == ("a", "b")
    assert "its 72 inputs are no multiple of the block of 32" in result.plan.skipped["odd"]
    assert isinstance(result.model.a, BlockLinear)
    assert result.after.bytes < result.before.bytes
    assert result.after.parameter_count == result.before.parameter_count


@pytest.mark.parametrize("parameters", [{"algorithm": "awq"}, {"algorithm": "gptq"}, {"activations": "int8"}])
def test_what_needs_data_says_so(net: Net, parameters: dict[str, str]) -> None:
    with pytest.raises(ToolchainError, match=f"{next(iter(parameters.values()))}.* needs calibration inputs"):
        QuantizeWeights(**parameters).plan(net, Context())


def test_awq_and_gptq_beat_rounding_on_the_inputs_that_they_saw(net: Net) -> None:
    [call] = context().calibration
    wanted = net(**call).detach()
    error = {}
    for algorithm in ("rtn", "awq", "gptq"):
        torch.manual_seed(0)
        fresh = Net().eval()
        fresh.load_state_dict(net.state_dict())
        result = QuantizeWeights(algorithm=algorithm).apply(fresh, context())
        error[algorithm] = relative(result.model(**call), wanted)
    assert error["awq"] < error["rtn"]
    assert error["gptq"] < error["rtn"]


def test_codes_that_data_chose_are_never_replaced_by_rounding(net: Net) -> None:
    step = QuantizeWeights(algorithm="gptq")
    plan = step.plan(net, context())
    without = replace(plan, arrays={name: array for name, array in plan.arrays.items() if not name.endswith(".codes")})
    with pytest.raises(ToolchainError, match=r"the plan lacks the array 'a\.codes'"):
        step.carry_out(net, without, context())


def test_awq_folds_into_the_norm_and_nothing_else(net: Net) -> None:
    plan = QuantizeWeights(algorithm="awq").plan(net, context())
    assert plan.choice["norm"] == DividedNorm(divided_by="a.smooth")
    assert plan.choice["a"].smooth.folded is True


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"block": 24}, "block is 24; it must be a power of two"),
        ({"weights": "nvfp4", "block": 32}, "block is 32; nvfp4 has blocks of 16"),
        ({"weights": "mxfp8", "block": 16}, "block is 16; mxfp8 has blocks of 32"),
        ({"weights": "nvfp4", "activations": "fp4"}, "activations is 'fp4'; in blocks their scales must be measured"),
        ({"weights": "int8", "activations": "int8"}, "activations is 'int8'; beside int8 weights it is refused"),
    ],
)
def test_what_no_graph_can_hold_is_refused_with_the_reason(parameters: dict[str, object], said: str) -> None:
    with pytest.raises(ToolchainError, match=said):
        QuantizeWeights(**parameters)


def test_the_file_holds_two_weights_in_a_byte(tmp_path: Path) -> None:
    from enginewright.targets.onnx_export import export_onnx

    size = {}
    for weights in ("int4", "int8"):
        torch.manual_seed(0)
        done = QuantizeWeights(weights=weights).apply(nn.Sequential(nn.Linear(512, 512)), Context()).model
        path = tmp_path / f"{weights}.onnx"
        export_onnx(done.eval(), {"input": torch.randn(2, 512)}, dynamic={}, outputs=["y"], path=path)
        size[weights] = path.with_suffix(".safetensors").stat().st_size
    assert size["int8"] - size["int4"] == 512 * 512 // 2
