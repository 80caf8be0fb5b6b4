"""Real builds, without a GPU. What needs one is marked so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.quantization.linear import QuantizedLinear
from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx

pytest.importorskip("tensorrt_rtx")

RANGES = {"x": ShapeRange((1, 64), (4, 64), (8, 64))}


def export(net: nn.Module, path: Path) -> Graph:
    dynamic = {"x": {0: ("batch", 1, 8)}}
    export_onnx(net.eval(), {"x": torch.randn(2, 64)}, dynamic=dynamic, outputs=["y"], path=path)
    return Graph(path=path, ranges=RANGES)


def test_an_8_bit_graph_builds_with_a_dynamic_batch(tmp_path: Path) -> None:
    net = Wrapped(QuantizedLinear(nn.Linear(64, 64), 0.05))
    graph = export(net, tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    TensorRtRtx().build(graph, tmp_path / "engine")
    assert (tmp_path / "engine" / "engine.plan").stat().st_size > 1000
    log = (tmp_path / "engine" / "build.log").read_text()
    assert str(tmp_path) not in log


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Scatter(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[torch.nonzero(x[:, 0] > 0)[:, 0]].sum(0)


def test_an_operator_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    graph = export(Scatter(), tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    with pytest.raises(ToolchainError, match=r"refuses these operators: .*NonZero"):
        TensorRtRtx().build(graph, tmp_path / "engine")


def test_it_builds_here_and_says_why_it_does_not_run() -> None:
    able = TensorRtRtx().availability()
    assert able.buildable.yes
    if not able.runnable.yes:
        assert "NVIDIA driver" in able.why_not("runnable")


@pytest.mark.gpu
def test_on_a_gpu_it_runs_and_agrees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Wrapped(nn.Linear(64, 64))
    graph = export(net, tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    TensorRtRtx().build(graph, tmp_path / "engine")
    x = torch.randn(4, 64)
    found = TensorRtRtx().load(tmp_path / "engine", threads=1, module=lambda: net)({"x": x.numpy()})["y"]
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=1e-2, atol=1e-2)
