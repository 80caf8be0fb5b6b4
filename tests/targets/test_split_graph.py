"""Graphs made by hand, parted in two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from enginewright.ground.errors import ToolchainError
from enginewright.targets.split_graph import Halves, split_graph


def write(nodes: list[onnx.NodeProto], folder: Path) -> Path:
    """A graph of x (B, 4) and c (B, 4) -> y, with a matrix w."""
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "c")]
    weights = [
        numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4) / 8, "w"),
        numpy_helper.from_array(np.array([2, 1], np.int64), "twice"),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", floats, [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def run(path: Path, call: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, call), strict=True))


def both(nodes: list[onnx.NodeProto], folder: Path) -> tuple[Halves, set[str]]:
    """How the halves are called, and the operators of the second; their outcome is held to the whole graph's."""
    path = write(nodes, folder)
    call = {name: np.random.default_rng(i).normal(size=(3, 4)).astype(np.float32) for i, name in enumerate("xc")}
    used = {value.name for value in ir.load(path).graph.inputs}
    wanted = run(path, {name: call[name] for name in used})["y"]
    first, second = folder / "first.onnx", folder / "second.onnx"
    halves = split_graph(path, ["c"], first, second)
    passed = run(first, {name: call[name] for name in halves.prepare})
    found = run(second, {**{name: call[name] for name in halves.step}, **passed})["y"]
    np.testing.assert_array_equal(found, wanted)
    assert not path.exists()
    return halves, {node.op_type for node in ir.load(second).graph}


def test_a_product_of_the_constant_is_passed_on(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["c", "w"], ["k"]),
        helper.make_node("Relu", ["k"], ["r"]),
        helper.make_node("Mul", ["x", "r"], ["y"]),
    ]
    halves, operators = both(nodes, tmp_path)
    assert halves == Halves(prepare=("c",), step=("x",), passed=("r",))
    assert operators == {"Mul"}
    assert not ir.load(tmp_path / "second.onnx").graph.initializers


def test_what_only_repeats_is_done_again(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["c", "w"], ["k"]),
        helper.make_node("Tile", ["k", "twice"], ["t"]),
        helper.make_node("Concat", ["x", "x"], ["xx"], axis=0),
        helper.make_node("Add", ["xx", "t"], ["y"]),
    ]
    halves, operators = both(nodes, tmp_path)
    assert halves.passed == ("k",)
    assert "Tile" in operators


def test_sizes_come_from_the_tensors_that_are_passed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["c", "w"], ["k"]),
        helper.make_node("Shape", ["k"], ["s"]),
        helper.make_node("Reshape", ["x", "s"], ["z"]),
        helper.make_node("Mul", ["z", "k"], ["y"]),
    ]
    halves, operators = both(nodes, tmp_path)
    assert halves.passed == ("k",)
    assert operators == {"Shape", "Reshape", "Mul"}


def test_an_input_that_steps_read_themselves_stays_theirs_too(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["c", "w"], ["k"]),
        helper.make_node("Add", ["x", "c"], ["z"]),
        helper.make_node("Mul", ["z", "k"], ["y"]),
    ]
    halves, _ = both(nodes, tmp_path)
    assert halves == Halves(prepare=("c",), step=("x", "c"), passed=("k",))


def test_an_output_of_the_constant_alone_is_given_by_the_second_graph(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["c", "w"], ["k"]), helper.make_node("Relu", ["k"], ["y"])]
    halves, operators = both(nodes, tmp_path)
    assert halves.passed == ("k",)
    assert operators == {"Relu"}


def test_a_branch_that_reads_what_changes_stays_in_the_step(tmp_path: Path) -> None:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["k", "x"], [name])], name, [], [result])

    flag = numpy_helper.from_array(np.array(True))
    nodes = [
        helper.make_node("MatMul", ["c", "w"], ["k"]),
        helper.make_node("Constant", [], ["flag"], value=flag),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch("a", "Add"), else_branch=branch("b", "Mul")),
    ]
    halves, operators = both(nodes, tmp_path)
    assert halves == Halves(prepare=("c",), step=("x",), passed=("k",))
    assert operators == {"If", "Constant"}


def test_a_graph_without_work_of_the_constant_alone_is_refused(tmp_path: Path) -> None:
    path = write([helper.make_node("Add", ["x", "c"], ["y"])], tmp_path)
    with pytest.raises(ToolchainError, match="no operation of the exported graph depends on c alone"):
        split_graph(path, ["c"], tmp_path / "first.onnx", tmp_path / "second.onnx")
    assert path.exists()
