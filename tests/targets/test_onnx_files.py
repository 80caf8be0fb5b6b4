from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from enginewright.ground.errors import ToolchainError
from enginewright.targets.onnx_files import check_onnx


def write(path: Path, location: str = "", offset: int = 0, length: int = 16) -> Path:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], np.zeros(4, np.float32).tobytes(), raw=True)
    if location:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            weight.external_data.add(key=key, value=value)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [4])],
        [value("y", TensorProto.FLOAT, [4])],
        [weight],
    )
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())
    return path


def test_a_sound_file_passes_and_external_data_within_its_file_too(tmp_path: Path) -> None:
    check_onnx(write(tmp_path / "in.onnx"))
    (tmp_path / "w.bin").write_bytes(bytes(32))
    check_onnx(write(tmp_path / "ex.onnx", "w.bin", 16))


def test_truncated_not_onnx_empty_and_missing(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.onnx").write_text("this is no model, it is a letter to a friend")
    (tmp_path / "empty.onnx").touch()
    for name in ("cut", "text", "empty"):
        with pytest.raises(ToolchainError, match=rf"{name}\.onnx (is not an ONNX file|holds no ONNX graph)"):
            check_onnx(tmp_path / f"{name}.onnx")
    with pytest.raises(ToolchainError, match="there is no ONNX file"):
        check_onnx(tmp_path / "nowhere.onnx")


def test_external_data_may_not_leave_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (inside / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", str(tmp_path / "secret"), "link"):
        with pytest.raises(ToolchainError, match="outside the model's folder; refused"):
            check_onnx(write(inside / "m.onnx", location))


def test_external_data_may_not_pass_the_end_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(20))
    with pytest.raises(ToolchainError, match=r"ends at byte 24, but 'w\.bin' has 20"):
        check_onnx(write(tmp_path / "m.onnx", "w.bin", 8))
    with pytest.raises(ToolchainError, match="missing"):
        check_onnx(write(tmp_path / "m.onnx", "gone.bin"))
    with pytest.raises(ToolchainError, match="ends at byte"):
        check_onnx(write(tmp_path / "m.onnx", "w.bin", -8))


def test_tensors_hidden_in_subgraphs_are_checked_too(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "../secret")
    model = onnx.load(path, load_external_data=False)
    hidden = helper.make_graph([], "then", [], [], [model.graph.initializer[0]])
    model.graph.ClearField("initializer")
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=hidden, else_branch=hidden))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ToolchainError, match="outside"):
        check_onnx(path)
