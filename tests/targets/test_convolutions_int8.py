"""Convolutions of an ONNX graph in ONNX Runtime: rounded outputs where that is cheap, floats where it is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from enginewright import sources
from enginewright.passes.contract import Context
from enginewright.passes.graph.quantize_graph_int8 import QuantizeGraphInt8
from enginewright.passes.kernel.graph_module import graph_of
from enginewright.targets.contract import Built, Graph, LayerHint
from enginewright.targets.onnx_export import save
from enginewright.targets.onnxruntime_engine import OnnxRuntime
from tests.graphs import mixed, noise, tensor, write

X = {"x": np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)}
Hints = dict[str, LayerHint]


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[Path, Hints, np.ndarray]:
    """The 8-bit graph in an artifact folder, its plan, and what the original answers."""
    module = sources.load(f"onnx:{mixed(tmp_path / 'm.onnx')}").module
    x = {name: torch.from_numpy(array) for name, array in X.items()}
    wanted = module(**x)[0].numpy()
    result = QuantizeGraphInt8().apply(module, Context(calibration=[x]))
    (tmp_path / "artifact" / "engines" / "onnxruntime").mkdir(parents=True)
    save(graph_of(result.model), tmp_path / "artifact" / "model.onnx")
    return (
        tmp_path / "artifact",
        {name: LayerHint.of(choice.as_json()) for name, choice in result.plan.choice.items()},
        wanted,
    )


def build(root: Path, hints: Hints, form: str) -> tuple[Built, Path]:
    folder = root / "engines" / "onnxruntime"
    graph = Graph(path=root / "model.onnx", ranges={}, examples=[X], hints=hints)
    built = OnnxRuntime(int8=form).build(graph, folder)
    return built, (folder / json.loads((folder / "engine.json").read_text())["graph"]).resolve()


def executed(path: Path) -> list[str]:
    """Operators after ONNX Runtime's own rewriting."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("executed.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path.with_name("executed.onnx"), load_external_data=False).graph
    return [node.op_type for node in graph.node]


def error(root: Path, wanted: np.ndarray) -> float:
    found = OnnxRuntime().load(root / "engines" / "onnxruntime", threads=1)(X)["y"]
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_rounded_outputs_make_convolutions_run_in_8_bits(quantized: tuple[Path, Hints, np.ndarray]) -> None:
    root, hints, wanted = quantized
    assert "QLinearConv" not in executed(root / "model.onnx")
    built, path = build(root, hints, "static")
    assert path.name == "rounded.onnx"
    assert "QLinearConv" in executed(path)
    assert "2 convolutions: in 8 bits with rounded outputs" in built.notes[0]
    assert 0 < error(root, wanted) < 0.1


def test_an_output_that_rounding_would_spoil_stays_a_float(quantized: tuple[Path, Hints, np.ndarray]) -> None:
    root, hints, wanted = quantized
    hints["conv"] = replace(hints["conv"], output_scale=40 * hints["conv"].output_scale)
    built, path = build(root, hints, "static")
    assert path == (root / "model.onnx").resolve()
    assert "2 convolutions compute in floats" in built.notes[0]
    assert error(root, wanted) < 0.1


def test_the_dynamic_form_has_integer_products_and_float_convolutions(
    quantized: tuple[Path, Hints, np.ndarray],
) -> None:
    root, hints, wanted = quantized
    _, path = build(root, hints, "dynamic")
    operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert operators.count("MatMulInteger") == 3
    assert operators.count("Conv") == 2
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators)
    assert 0 < error(root, wanted) < 0.1


def test_a_product_that_is_the_graphs_output_keeps_its_name(tmp_path: Path) -> None:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="only")
    source = write(tmp_path / "m.onnx", [node], [tensor("x", ["batch", 64])], ["y"], {"w": noise(64, 32)})
    x = torch.randn(2, 64)
    result = QuantizeGraphInt8().apply(sources.load(f"onnx:{source}").module, Context(calibration=[{"x": x}]))
    root = tmp_path / "artifact"
    (root / "engines" / "onnxruntime").mkdir(parents=True)
    save(graph_of(result.model), root / "model.onnx")
    folder = root / "engines" / "onnxruntime"
    OnnxRuntime(int8="dynamic").build(Graph(path=root / "model.onnx", ranges={}, examples=[{"x": x.numpy()}]), folder)
    assert list(OnnxRuntime().load(folder, threads=1)({"x": x.numpy()})) == ["y"]
