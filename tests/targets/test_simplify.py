"""Constants near 0 or 1 stay: in the simplified graph, and in ONNX Runtime at full optimization."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from enginewright.targets import simplify
from enginewright.targets.onnx_export import export_onnx

TYPES = {
    "float32": (onnx.TensorProto.FLOAT, np.dtype(np.float32)),
    "float16": (onnx.TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (onnx.TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min")
ALL, NONE = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


def near(dtype: np.dtype) -> list[np.ndarray]:
    """1e-7 to 1e-30, these beside 1, and a few further off; without those that are 0 or 1 in the type."""
    small = [10.0**-power for power in range(7, 31)]
    wanted = [v for c in small for v in (c, -c, 1 + c, 1 - c)] + [1e-4, 1 + 2e-6, 1 - 2e-6, 1.00001, 1.001]
    found = {array.item(): array for array in (np.array(value).astype(dtype) for value in wanted)}
    return [array for value, array in found.items() if value not in (0, 1)]


def graph(kind: int, constants: list[np.ndarray], *, nodes_hold_them: bool) -> onnx.ModelProto:
    """Every operation with every constant on either side, one output each."""
    nodes, weights, outputs = [], [], []
    for i, value in enumerate(constants):
        held = helper.make_tensor(f"c{i}", kind, [], [float(value)])
        if kind != onnx.TensorProto.BFLOAT16:
            held = numpy_helper.from_array(value, f"c{i}")
        if nodes_hold_them:
            nodes.append(helper.make_node("Constant", [], [f"c{i}"], value=held))
        else:
            weights.append(held)
        for name in BINARY:
            nodes.append(helper.make_node(name, ["x", f"c{i}"], [f"{name}_{i}"]))
            nodes.append(helper.make_node(name, [f"c{i}", "x"], [f"{name}_from_{i}"]))
        nodes.append(helper.make_node("Relu", ["x"], [f"relu_{i}"]))
        nodes.append(helper.make_node("Clip", [f"relu_{i}", f"c{i}"], [f"clip_{i}"]))
        outputs += [f"{name}{middle}{i}" for name in BINARY for middle in ("_", "_from_")] + [f"clip_{i}"]
    info = [helper.make_tensor_value_info(name, kind, ["rows", 9]) for name in ("x", *outputs)]
    made = helper.make_graph(nodes, "g", info[:1], info[1:], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    simplify.simplify(graph, should_fold=lambda node: None)
    return ir.to_proto(graph)


def run(model: onnx.ModelProto, x: np.ndarray, level: onnxruntime.GraphOptimizationLevel) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([out.name for out in session.get_outputs()], session.run(None, {"x": x}), strict=True))


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("nodes_hold_them", [False, True], ids=["initializers", "constant nodes"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_constant_near_0_or_1_is_taken_for_it(
    dtype: str, nodes_hold_them: bool, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplify, "LONG_GRAPH", 0 if long else 10**9)
    kind, numpy_type = TYPES[dtype]
    model = graph(kind, near(numpy_type), nodes_hold_them=nodes_hold_them)
    x = np.array([[0, -0.0, 1, -1, 1e-7, 3.14159, -2.71828, 0.3333, 17]]).astype(numpy_type)
    wanted, found = run(model, x, NONE), run(simplified(model), x, ALL)
    assert [name for name in wanted if not np.array_equal(wanted[name], found[name], equal_nan=True)] == []


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("nodes_hold_them", [False, True], ids=["initializers", "constant nodes"])
def test_in_bfloat16_every_operation_stays(
    nodes_hold_them: bool, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # ONNX Runtime computes no bfloat16 on a CPU
    monkeypatch.setattr(simplify, "LONG_GRAPH", 0 if long else 10**9)
    kind, numpy_type = TYPES["bfloat16"]
    constants = near(numpy_type)
    left = simplified(graph(kind, constants, nodes_hold_them=nodes_hold_them)).graph.node
    for name in BINARY:
        assert sum(node.op_type == name for node in left) >= len(constants), name


@pytest.mark.parametrize(("number", "operations"), [(0.0, ("Add", "Sub")), (1.0, ("Mul", "Div"))])
def test_a_true_0_or_1_still_goes(number: float, operations: tuple[str, ...]) -> None:
    left = [n.op_type for n in simplified(graph(1, [np.float32(number)], nodes_hold_them=False)).graph.node]
    assert [left.count(name) for name in operations] == [0 if name in ("Add", "Mul") else 1 for name in operations]


def test_rules_of_the_library_are_copied_not_changed() -> None:
    from onnxscript import rewriter

    assert len(simplify.exact_rules()) == len(tuple(rewriter._DEFAULT_REWRITE_RULES))
    assert not any(isinstance(rule._matcher, simplify.ExactMatcher) for rule in rewriter._DEFAULT_REWRITE_RULES)


class Log(nn.Module):
    """The logarithm of what may be 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.linear(x))
        return torch.log(y + 1e-9) + y / (y.sum(-1, keepdim=True) * 0 + 1e-10) * (1 + 1e-6)


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_log_of_a_number_plus_1e_9_stays_finite(tmp_path: Path, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "LONG_GRAPH", 0 if long else 10**9)
    torch.manual_seed(0)
    module, x = Log().eval(), torch.randn(4, 8)
    dynamic = {"x": {0: ("batch", 1, 8)}}
    export_onnx(module, {"x": x}, dynamic=dynamic, outputs=["y"], path=tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, module(x).detach(), rtol=1e-5)
