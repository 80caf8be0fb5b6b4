"""An ONNX graph as a PyTorch module, so that all that runs, copies and counts modules can take one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError, require

PAIR = ("QuantizeLinear", "DequantizeLinear")
LARGEST_INLINE = 1024
"""Bytes; larger weights are handed to ONNX Runtime in a file, because a graph file holds 2 GiB at most."""


class GraphModule(nn.Module):
    """Runs an ONNX graph in ONNX Runtime on the CPU.

    Args:
        graph: read only from here on; a pass clones it and gives a new module.
        file: the untouched file that the graph was read from; runs in the graph's place.
        optimized: let ONNX Runtime rewrite the graph first, as engines do. Off, it is computed operator by operator as
            it is written: what engines are compared with must not share their optimizer's mistakes.
    """

    def __init__(self, graph: ir.Model, file: Path | None = None, *, optimized: bool = False) -> None:
        super().__init__()
        self.graph, self.file, self.optimized = graph, file, optimized
        self.sessions: dict[int, Any] = {}
        """By number of threads; made at the first call."""

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        return GraphModule(self.graph.clone(), self.file, optimized=self.optimized)

    def as_used(self) -> GraphModule:
        """The same graph as a user would run it, optimized: what times are compared with."""
        return GraphModule(self.graph, self.file, optimized=True)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs by name -> outputs in the graph's order.

        Raises:
            ToolchainError: ONNX Runtime refuses the graph, or cannot run it on these inputs.
        """
        session = self.session(torch.get_num_threads())
        known = {value.name for value in session.get_inputs()}
        try:
            found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in known})
        except Exception as cause:  # onnxruntime raises pybind classes of no common base
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
            raise ToolchainError(
                f"ONNX Runtime cannot run the graph on {shapes}: {reason(cause)}",
                help="say which sizes it takes: 'onnx:FILE.onnx?NAME=SMALLEST..LARGEST,…' or '…?NAME=SIZE'",
            ) from cause
        return tuple(torch.from_numpy(np.asarray(array)) for array in found)

    def session(self, threads: int) -> Any:
        """An inference session over the file, or else over the graph."""
        if threads not in self.sessions:
            self.sessions[threads] = self.open(threads)
        return self.sessions[threads]

    def open(self, threads: int) -> Any:
        """A new session."""
        runtime = require("onnxruntime", extra="cpu")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong is raised
        if not self.optimized:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            path = self.file or Path(folder) / "model.onnx"
            if self.file is None:
                ir.save(self.graph, path, external_data="weights", size_threshold_bytes=LARGEST_INLINE)
            try:
                return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as cause:  # as above
                raise ToolchainError(f"ONNX Runtime refuses the graph: {reason(cause)}") from cause


def reason(cause: Exception) -> str:
    """The first line of what ONNX Runtime says."""
    return next(iter(str(cause).splitlines()), type(cause).__name__)


def graph_of(model: nn.Module) -> ir.Model:
    """The graph that a graph pass was handed."""
    assert isinstance(model, GraphModule), f"{type(model).__name__} holds no graph"
    return model.graph


def weights_of(graph: ir.Model) -> list[ir.Value]:
    """Every initializer that has a value, those of branches and loop bodies included."""
    graphs = (graph.graph, *graph.graph.subgraphs())
    return [value for one in graphs for value in one.initializers.values() if value.const_value is not None]


def is_parameter(value: ir.Value) -> bool:
    """Whether an initializer was learned: a float that is no scale of a quantized one, or an 8-bit matrix."""
    scales = value.uses() and all(use.node.op_type in PAIR and use.idx > 0 for use in value.uses())
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype.is_floating_point():
        return not scales
    return tensor.dtype.bitwidth == 8 and len(tensor.shape) > 1
