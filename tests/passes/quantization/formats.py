"""What the tests of quantization formats share: exporting a subject, running it in ONNX Runtime, building engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnxruntime_engine import OnnxRuntime
from enginewright.targets.pytorch_engine import flat
from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx
from tests.passes.conftest import Subject

KINDS = ["reference_dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_sdpa", "bert_sdpa"))]
"""Subjects that each format is exported, run and built on; one of them in every run."""


def exported(subject: Subject, model: nn.Module, path: Path) -> Graph:
    """The ONNX graph of a model, at the sizes of the subject's inputs."""
    if hasattr(model, "config") and hasattr(model.config, "return_dict"):
        model.config.return_dict = False
    with torch.no_grad():
        names = ["result", *(f"more_{i}" for i in range(1, len(flat(model(**subject.inputs)))))]
    export_onnx(model.eval(), subject.inputs, dynamic={}, outputs=names, path=path)
    inputs = {name: tensor.numpy() for name, tensor in subject.inputs.items()}
    ranges = {name: ShapeRange(*3 * (array.shape,)) for name, array in inputs.items()}
    return Graph(path=path, ranges=ranges, examples=[inputs])


def in_onnxruntime(graph: Graph) -> np.ndarray:
    """What ONNX Runtime's engine of a graph answers."""
    folder = graph.path.parent / "engines" / "onnxruntime"
    folder.mkdir(parents=True)
    OnnxRuntime().build(graph, folder)
    return OnnxRuntime().load(folder, threads=1)(dict(graph.examples[0]))["result"]


def builds_in_tensorrt_rtx(graph: Graph) -> bool:
    """Whether TensorRT-RTX makes an engine of a graph; raises its reason where it does not."""
    folder = graph.path.parent / "engines" / "tensorrt_rtx"
    folder.mkdir(parents=True)
    TensorRtRtx().build(graph, folder)
    return (folder / "engine.plan").stat().st_size > 1000


def relative(found: torch.Tensor | np.ndarray, wanted: torch.Tensor | np.ndarray) -> float:
    """Relative L2 error."""
    found, wanted = (np.asarray(torch.as_tensor(value).detach(), np.float64) for value in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def weight_types(path: Path) -> set[int]:
    """ONNX types of the initializers that DequantizeLinear reads."""
    graph = onnx.load(path, load_external_data=False).graph
    read = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {tensor.data_type for tensor in graph.initializer if tensor.name in read}
