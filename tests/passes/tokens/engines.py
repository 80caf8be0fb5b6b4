"""Export a model, run it in ONNX Runtime beside PyTorch, and build it for TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnxruntime_engine import OnnxRuntime
from enginewright.targets.pytorch_engine import flat


def exported(model, inputs, folder: Path, *, length: str | None = None) -> Path:
    """The graph with a dynamic batch, and a dynamic second dimension where it has a name."""
    dynamic = {name: {0: ("batch", 1, 8)} | ({1: (length, 2, 64)} if length else {}) for name in inputs}
    with torch.no_grad():
        outputs = [f"y{i}" for i, _ in enumerate(flat(model(**inputs)))]
    export_onnx(model.eval(), inputs, dynamic=dynamic, outputs=outputs, path=folder / "model.onnx")
    return folder / "model.onnx"


def agrees(model, calls, path: Path, *, tolerance: float = 1e-4) -> None:
    """ONNX Runtime gives what PyTorch gives, at every size asked for."""
    engine = OnnxRuntime().open(path, 1)
    for call in calls:
        with torch.no_grad():
            wanted = flat(model(**call))
        found = engine({name: tensor.numpy() for name, tensor in call.items()})
        for got, want in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, atol=tolerance, rtol=0)


def builds(path: Path, inputs, folder: Path) -> None:
    """TensorRT-RTX takes the graph; raises what it says if not."""
    pytest.importorskip("tensorrt_rtx")
    from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx

    ranges = {name: ShapeRange(*((batch, *tensor.shape[1:]) for batch in (1, 2, 8))) for name, tensor in inputs.items()}
    (folder / "engine").mkdir()
    TensorRtRtx().build(Graph(path=path, ranges=ranges), folder / "engine")
    assert (folder / "engine" / "engine.plan").stat().st_size > 1000


def tripled(inputs):
    """Another batch size: three times the same, in reverse."""
    return {name: torch.cat([tensor, tensor, tensor]).flip(0) for name, tensor in inputs.items()}
