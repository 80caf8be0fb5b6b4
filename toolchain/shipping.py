"""What of an artifact has to be copied for an engine to run elsewhere, and how it is called there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from enginewright.ground.program import Program
from enginewright.ground.reading import read_setting
from enginewright.ground.signature import Dim, InputSpec, rows_of
from enginewright.programs import graph_of, place_of
from enginewright.recipe import TargetStep
from enginewright.reports.deploying import Engine, Value
from enginewright.targets.aot_inductor_engine import PACKAGE
from enginewright.targets.contract import Target
from enginewright.targets.onnx_files import external_files
from enginewright.targets.onnxruntime_engine import (
    ENGINE,
    EVERY_OPTIMIZER,
    PROVIDERS,
    disabled_optimizers,
    options_for_weights,
)
from enginewright.targets.python_program_engine import PROGRAM
from enginewright.targets.tensorrt_builder import ENGINE as PLAN
from enginewright.targets.weights import load_graph


def engines_of(
    step: TargetStep,
    program: Program,
    parts: Sequence[str],
    specs: Sequence[InputSpec],
    folder: Path,
    left_out: Sequence[str],
) -> list[Engine]:
    """Every engine of a target that was built into an artifact's folder.

    Args:
        step: the target.
        program: what was exported.
        parts: the networks that it has an engine of.
        specs: the inputs that the exported model takes.
        folder: of the artifact.
        left_out: for each part, the optimizer of ONNX Runtime that fails on it, or nothing.
    """
    dims = {d.name: d for spec in specs for d in spec.shape if isinstance(d, Dim)}
    rows = rows_of(specs) or 1
    firsts = [
        InputSpec(name=s.name, shape=(rows, *s.shape), dtype=s.dtype, default=s.first)
        for s in (program.states if program.start else ())
    ]
    found = []
    for part, off in zip(parts, left_out, strict=True):
        passed = passed_to(program, part, specs)
        found.append(
            one_engine(step.target, part, place_of(step, folder, part), folder, dims, (*specs, *firsts), passed, off)
        )
    return found


def passed_to(program: Program, network: str, specs: Sequence[InputSpec]) -> tuple[str, ...]:
    """Inputs of a network that another one gives."""
    known = {*(spec.name for spec in specs), *(state.name for state in program.states)}
    takes = program.networks[network].takes if network in program.networks else None
    return tuple(name for name in takes or () if name not in known)


def one_engine(
    target: Target,
    part: str,
    place: Path,
    folder: Path,
    dims: dict[str, Dim],
    specs: Sequence[InputSpec],
    passed: tuple[str, ...],
    left_out: str,
) -> Engine:
    """One engine: its files, and its inputs and outputs as its graph declares them."""
    if target.runs_module:
        return Engine(kind="module", folder=place.name, files=sizes(place, folder))
    named = place / ENGINE
    if named.is_file():
        graph = (place / read_setting(named, "graph", str)).resolve()
        model = onnx.load(graph, load_external_data=False)
        files = {graph, *((graph.parent / name).resolve() for name in external_files(model))}
        inside = graph.parent == place.resolve()
        return Engine(
            kind="onnxruntime",
            folder=place.name if inside else target.name(),  # files that several engines read are copied once
            file=graph.name,
            files=sizes(place, folder) if inside else by_path(files, folder),
            inputs=values(model.graph.input, dims, specs),
            outputs=values(model.graph.output, dims, specs),
            provider=PROVIDERS[getattr(target, "provider", "cpu")],
            disabled=[*disabled_optimizers(model), *([left_out] if left_out not in ("", EVERY_OPTIMIZER) else [])],
            plain=left_out == EVERY_OPTIMIZER,
            options=options_for(target, graph),
            passed=passed,
        )
    model = onnx.load(graph_of(folder, part), load_external_data=False)
    file = next((name for name in (PROGRAM, PACKAGE) if (place / name).is_file()), PLAN)
    return Engine(
        kind="python" if file == PROGRAM else getattr(target, "module", target.name()),
        folder=place.name,
        file=file,
        files=by_path({place / file}, folder) if file == PLAN else sizes(place, folder),
        inputs=values(model.graph.input, dims, specs),
        outputs=values(model.graph.output, dims, specs),
        passed=passed,
    )


def options_for(target: Target, graph: Path) -> dict[str, str]:
    """Options of a session without which ONNX Runtime would round more than what was measured, or be slower."""
    return options_for_weights(load_graph(graph), getattr(target, "weights_only", "exact"))


def sizes(place: Path, folder: Path) -> dict[str, int]:
    """Every file of an engine's folder."""
    return by_path({path for path in place.rglob("*") if path.is_file()}, folder)


def by_path(files: set[Path], folder: Path) -> dict[str, int]:
    """Files by their paths in the artifact, with their sizes."""
    root = folder.resolve()
    return {path.resolve().relative_to(root).as_posix(): path.stat().st_size for path in sorted(files)}


def values(declared: Any, dims: dict[str, Dim], specs: Sequence[InputSpec]) -> tuple[Value, ...]:
    """Inputs or outputs of a graph."""
    known = {spec.name: spec for spec in specs}
    return tuple(value_of(each, dims, known.get(each.name)) for each in declared)


def value_of(declared: onnx.ValueInfoProto, dims: dict[str, Dim], spec: InputSpec | None) -> Value:
    """One of them, called at the smallest sizes that it takes, with a value that its contract allows."""
    tensor = declared.type.tensor_type
    shape, said = [], []
    for size in tensor.shape.dim:
        dim = dims.get(size.dim_param)
        shape.append(size.dim_value if size.HasField("dim_value") else dim.low if dim else 1)
        said.append(f"{dim.name} {dim.low} to {dim.high}" if dim else str(shape[-1]))
    name = "bfloat16" if tensor.elem_type == onnx.TensorProto.BFLOAT16 else None
    lowest = 1 if spec is None or spec.low is None else max(1, int(spec.low))
    too_large = spec is not None and spec.high is not None and "int" in spec.dtype and spec.high <= 1
    fill = 0 if too_large else lowest
    return Value(
        name=declared.name,
        dtype=name or helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        shape=tuple(shape),
        said=f"({', '.join(said)})" if any(d.dim_param for d in tensor.shape.dim) else "",
        fill=fill if spec is None or spec.default is None else int(spec.default),
    )
