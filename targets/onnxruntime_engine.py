"""ONNX Runtime: on the CPU everywhere, on CUDA or TensorRT where the GPU package is installed and a GPU answers.

8-bit products come as static QuantizeLinear pairs. On a CPU the dynamic form is tried too, and whichever is measured
faster here is kept (``int8="auto"``). Where the processor's 8-bit product saturates, the layers that a pass marked
``reduced_range`` get 7-bit weights.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from torch import nn

from targets import machine
from targets.contract import Answer, Arrays, Availability, Built, Graph, Runner, Target
from targets.dynamic_int8 import reduce_range, static_products, to_dynamic
from targets.onnx_export import save
from targets.onnx_files import check_onnx
from toolchain.errors import ToolchainError, require

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
MODEL = "model.onnx"


class OnnxRuntime(Target):
    """An ONNX graph for ONNX Runtime, with its weights beside it."""

    provider: Literal["cpu", "cuda", "tensorrt"] = Field("cpu", description="execution provider")
    int8: Literal["auto", "static", "dynamic"] = Field(
        "auto", description="form of 8-bit products on a CPU; auto measures both and keeps the faster"
    )

    def availability(self) -> Availability:
        """Needs the package, and for CUDA and TensorRT also that provider in it and a GPU."""
        found = machine.installed("onnxruntime", extra="gpu")
        imports = machine.importable("onnxruntime") if found.yes else Answer(False, "not installed")
        runs = imports
        if imports.yes and self.provider != "cpu":
            offered = require("onnxruntime", extra="gpu").get_available_providers()
            if PROVIDERS[self.provider] not in offered:
                runs = Answer(False, f"this onnxruntime has no {PROVIDERS[self.provider]}; it has {', '.join(offered)}")
            else:
                runs = machine.gpu()
        return Availability(installed=found, importable=imports, buildable=imports, runnable=runs)

    def build(self, graph: Graph, folder: Path) -> Built:
        """Link the graph and its weights into ``folder``; lower 8-bit products for a CPU."""
        weights = graph.path.with_suffix(".safetensors")
        if weights.exists():
            link(weights, folder / weights.name)
        model = ir.load(graph.path)
        products = sum(1 for _ in static_products(model))
        if not products or self.provider != "cpu":
            link(graph.path, folder / MODEL)
            self.session(folder / MODEL, graph.threads)
            return Built()
        return self.lower(model, products, graph, folder)

    def lower(self, model: ir.Model, products: int, graph: Graph, folder: Path) -> Built:
        """Choose the form of the 8-bit products, write it, and say why."""
        notes: list[str] = []
        marked = {path for path, hint in graph.hints.items() if hint.get("reduced_range")}
        if marked and machine.int8_saturates():
            count = reduce_range(model, marked)
            notes.append(
                f"{count} of {products} 8-bit layers have 7-bit weights: "
                "this processor's 8-bit product would saturate in them"
            )
        chosen: str = self.int8
        changed = folder / "reduced.safetensors"
        if chosen != "dynamic":
            save(model, folder / MODEL, weights=changed)
        if chosen != "static":
            to_dynamic(model)
            save(model, folder / ("dynamic.onnx" if chosen == "auto" else MODEL), weights=changed)
        if chosen == "auto":
            graph.say("timing static against dynamic 8-bit products")
            static_s, dynamic_s = self.race(folder, graph)
            chosen = "dynamic" if dynamic_s <= static_s else "static"
            notes.append(
                f"{chosen} 8-bit products: the dynamic form took {dynamic_s / static_s:.2f} of the static form's time"
            )
            if chosen == "dynamic":
                (folder / "dynamic.onnx").replace(folder / MODEL)
            else:
                (folder / "dynamic.onnx").unlink()
        prune_unused(folder)
        return Built(resolved={"int8": chosen}, notes=tuple(notes))

    def race(self, folder: Path, graph: Graph, rounds: int = 12) -> tuple[float, float]:
        """Median seconds of the static and the dynamic form on an example, taken in turns."""
        sessions = [self.session(folder / name, graph.threads) for name in (MODEL, "dynamic.onnx")]
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for session, seconds in zip(sessions, taken, strict=True):
                session.run(None, graph.examples[0])
                start = time.perf_counter()
                session.run(None, graph.examples[0])
                seconds.append(time.perf_counter() - start)
        return float(np.median(taken[0])), float(np.median(taken[1]))

    def session(self, path: Path, threads: int) -> Any:
        """An inference session; a graph that ONNX Runtime refuses is a ``ToolchainError`` with its reason."""
        runtime = require("onnxruntime", extra="gpu")
        check_onnx(path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            return runtime.InferenceSession(path, options, providers=[PROVIDERS[self.provider]])
        except Exception as cause:  # onnxruntime raises pybind classes of no common base
            raise ToolchainError(f"ONNX Runtime refuses the graph: {str(cause).splitlines()[0]}") from cause

    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module] | None = None) -> Runner:
        """Ready ``model.onnx`` in ``folder``."""
        del module
        return SessionRunner(self.session(folder / MODEL, threads))


class SessionRunner:
    """Runs an ONNX Runtime session on named arrays."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = {value.name for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs; inputs that the graph folded away are left out."""
        found = self.session.run(None, {name: array for name, array in inputs.items() if name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))


def link(source: Path, target: Path) -> None:
    """Give a file a second name in the same file system, or copy it where that cannot be done."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def prune_unused(folder: Path) -> None:
    """Remove a weights file that the kept graph does not name."""
    used = {
        entry.value
        for tensor in check_onnx(folder / MODEL).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for path in folder.glob("*.safetensors"):
        if path.name not in used:
            path.unlink()
