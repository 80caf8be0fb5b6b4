"""What a rewritten model is tried on: the real export, ONNX Runtime, and a TensorRT-RTX build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from enginewright.targets.contract import Graph, LayerHint, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx


def exported(model: nn.Module, inputs: Mapping[str, Tensor], folder: Path, outputs: Sequence[str] = ("y",)) -> Path:
    """The ONNX file of a model, with the shapes of these inputs."""
    export_onnx(model.eval(), dict(inputs), dynamic={}, outputs=list(outputs), path=folder / "model.onnx")
    return folder / "model.onnx"


def in_onnxruntime(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """The graph's first output."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in known}
    return torch.from_numpy(np.asarray(session.run(None, feed)[0]))


def built(path: Path, inputs: Mapping[str, Tensor], decisions: Mapping[str, Any] | None = None) -> Path:
    """The folder of a TensorRT-RTX engine of the graph."""
    folder = path.parent / "engine"
    folder.mkdir()
    ranges = {name: ShapeRange(*(tuple(tensor.shape),) * 3) for name, tensor in inputs.items()}
    TensorRtRtx().build(
        Graph(path=path, ranges=ranges, hints={path: LayerHint.of(each) for path, each in (decisions or {}).items()}),
        folder,
    )
    return folder
