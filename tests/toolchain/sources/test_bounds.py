"""Models that would take all memory or all time: refused before they do."""

from __future__ import annotations

import resource
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from enginewright import sources
from enginewright.ground.errors import ToolchainError


def graph_of(path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], kind: int = TensorProto.FLOAT) -> str:
    """The model string of a graph from ``x`` to ``y``."""
    x = helper.make_tensor_value_info("x", kind, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return f"onnx:{path}"


def relu(path: Path, shape: list[int | str]) -> str:
    return graph_of(path, [helper.make_node("Relu", ["x"], ["y"])], shape)


@pytest.mark.parametrize("size", [2**31 - 1, 2**40, 2**62])
def test_an_input_that_no_memory_holds_is_not_drawn(tmp_path: Path, size: int) -> None:
    with pytest.raises(ToolchainError, match=r"input 'x' has [\d,]+ elements at its typical size"):
        sources.load(relu(tmp_path / "m.onnx", [size, 8]))
    text = relu(tmp_path / "open.onnx", ["n", 8])
    with pytest.raises(ToolchainError, match="elements at its typical size"):
        sources.load(f"{text}?n=1..{size}..{size}")
    assert sources.load(f"{text}?n=1..2..{size}").inputs[0].sizes() == (2, 8)


def test_a_size_of_thousands_of_digits_is_no_size(tmp_path: Path) -> None:
    text = relu(tmp_path / "m.onnx", ["n", 8])
    with pytest.raises(ToolchainError, match="is not NAME=SIZE"):
        sources.load(f"{text}?n=1..{'9' * 5_000}")


def loop(path: Path, trips: int, *, ends: bool) -> str:
    """A loop that doubles its input; ``ends``: until that is above 100."""
    value, condition = helper.make_tensor_value_info("v", TensorProto.FLOAT, [1]), TensorProto.BOOL
    body = [helper.make_node("Add", ["v", "v"], ["doubled"])]
    if ends:
        body += [
            helper.make_node("Constant", [], ["bound"], value=numpy_helper.from_array(np.float32(100))),
            helper.make_node("ReduceMax", ["doubled"], ["most"], keepdims=0),
            helper.make_node("Less", ["most", "bound"], ["again"]),
        ]
    else:
        body += [helper.make_node("Identity", ["go"], ["again"])]
    inner = helper.make_graph(
        body,
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", condition, []),
            value,
        ],
        [
            helper.make_tensor_value_info("again", condition, []),
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, [1]),
        ],
    )
    nodes = [
        helper.make_node("Constant", [], ["trips"], value=numpy_helper.from_array(np.int64(trips))),
        helper.make_node("Constant", [], ["start"], value=numpy_helper.from_array(np.bool_(True))),
        helper.make_node("Loop", ["trips", "start", "x"], ["y"], body=inner, name="doubling"),
    ]
    return graph_of(path, nodes, [1])


def test_a_loop_that_nothing_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"loop 'doubling' runs 4,611,686,018,427,387,904 times"):
        sources.load(loop(tmp_path / "m.onnx", 2**62, ends=False))


def test_a_loop_that_ends_by_its_condition_or_soon_is_read(tmp_path: Path) -> None:
    assert sources.load(loop(tmp_path / "while.onnx", 2**62, ends=True)).outputs == ("y",)
    assert sources.load(loop(tmp_path / "short.onnx", 3, ends=False)).outputs == ("y",)


@pytest.mark.parametrize("kind", [TensorProto.UNDEFINED, 99])
def test_an_element_type_that_is_none_is_said(tmp_path: Path, kind: int) -> None:
    text = relu(tmp_path / "m.onnx", [2, 8])
    proto = onnx.load(tmp_path / "m.onnx")
    proto.graph.input[0].type.tensor_type.elem_type = kind
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ToolchainError, match=f"input 'x' has element type {kind}, which ONNX does not know"):
        sources.load(text)


@pytest.mark.parametrize("location", ["w\0.bin", "x" * 5_000, "circle"])
def test_external_data_that_cannot_be_found_is_said(tmp_path: Path, location: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    text = graph_of(tmp_path / "m.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], [2, 8])
    proto = onnx.load(tmp_path / "m.onnx")
    proto.graph.initializer.append(weight)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ToolchainError, match=r"(cannot be found|is missing|lies outside)"):
        sources.load(text)


def test_a_program_that_unpacks_into_all_memory_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(4, 3), (torch.ones(2, 4),))
    torch.export.save(program, tmp_path / "good.pt2")
    with zipfile.ZipFile(tmp_path / "good.pt2") as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    model = next(name for name in records if name.endswith("models/model.json"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            with archive.open(name, "w") as record:
                record.write(content)
                for _ in range(300 if name == model else 0):
                    record.write(b" " * 1_000_000)
    assert (tmp_path / "bomb.pt2").stat().st_size < 2_000_000
    with pytest.raises(ToolchainError, match=r"model.json', 300,[\d,]+ bytes packed into"):
        sources.load(f"pt2:{tmp_path / 'bomb.pt2'}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150_000, "kilobytes: the record was unpacked"
