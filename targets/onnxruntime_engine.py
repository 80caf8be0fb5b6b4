"""ONNX Runtime: on the CPU everywhere, on CUDA or TensorRT where the GPU package is installed and a GPU answers.

8-bit products come as static QuantizeLinear pairs. On a CPU the dynamic form is tried too, and whichever is measured
faster here is kept (``int8="auto"``), unless it is much further from fp32. Where the processor's 8-bit product
saturates, the layers that a pass marked ``reduced_range`` get 7-bit weights.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from enginewright.ground.distance import relative_l2
from enginewright.ground.errors import ToolchainError, UnavailableError, require
from enginewright.ground.reading import read_setting
from enginewright.ground.runner import CPU, Runner, ToDevice, Values
from enginewright.ground.signature import Arrays
from enginewright.targets import machine
from enginewright.targets.contract import Answer, Availability, Built, Graph, Target
from enginewright.targets.devices import (
    CUDA,
    clock_on,
    has_cuda,
    holds_tensors,
    on_host,
    tensor_of,
    tensors_on,
    written,
)
from enginewright.targets.dynamic_int8 import add_output_pairs, reduce_range, static_products, to_dynamic, to_float
from enginewright.targets.four_bits import multiply_out
from enginewright.targets.onnx_export import module_path, save
from enginewright.targets.onnx_files import check_onnx, external_bytes, files_of
from enginewright.targets.weights import LINKED, load_graph

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
ENGINE = "engine.json"

ASSIGNMENT = "session.record_ep_graph_assignment_info"
"""Option of a session that lets it say which provider got which nodes; older versions do not know it."""

RACE_ROUNDS, RACE_FEWEST, RACE_S = 12, 3, 20.0
"""Rounds of a race, those run however long they take, and the seconds after which no other begins."""

ALIKE = 0.1
"""Forms whose times differ by less than this share are taken for equally fast: a race of some calls tells no more."""

ACCURACY_OPTION = "session.qdq_matmulnbits_accuracy_level"
ACCURACY = {"exact": "1", "fast": "4"}
"""ONNX Runtime's number for the activations of products with rounded weights: fp32, or 8 bits inside the product."""

FOLDING_OPTION = "session.disable_quant_qdq"
"""With it constant folding takes in pairs too, so that weights are multiplied out once, when a graph is loaded."""

FAST = "products with {bits}-bit weights round activations to 8 bits inside the product, which no plan says"
WEIGHTS_ONLY = {
    (4, "exact"): "products with 4-bit weights take activations in fp32, as the plan says; weights_only=fast rounds "
    "them to 8 bits inside the product, which is faster and less exact",
    (4, "fast"): FAST.format(bits=4),
    (8, "exact"): "8-bit weights are multiplied out when the engine is loaded: its file is small, its memory and time "
    "are those of fp32; weights_only=fast computes in 8 bits, faster and less exact",
    (8, "fast"): FAST.format(bits=8),
}
"""What is said of a graph with weights of so many bits and activations in floats, by form."""

EVERY_OPTIMIZER = "graph optimizer"
FAILING_OPTIMIZERS = ("QDQSelectorActionTransformer", EVERY_OPTIMIZER)
"""Left out one after the other where ONNX Runtime refuses a graph that it has rewritten itself."""

FAR, FURTHER = 0.01, 2.0
"""A faster 8-bit form is not taken where its relative error is above the first and that many times the other's."""


class OnnxRuntime(Target):
    """An ONNX graph for ONNX Runtime, with its weights beside it."""

    formats: ClassVar[Mapping[str, str]] = {
        "int8": "native",
        "fp8": "emulated",
        "int4_weights": "native",
        "int8_weights": "native",
        "int4_int8": "emulated",
        "nvfp4_weights": "emulated",
        "mxfp8_weights": "emulated",
    }

    provider: Literal["cpu", "cuda", "tensorrt"] = Field("cpu", description="execution provider")
    int8: Literal["auto", "static", "dynamic"] = Field(
        "auto", description="form of 8-bit products on a CPU; auto keeps the faster, unless it is far less accurate"
    )

    weights_only: Literal["exact", "fast"] = Field(
        "exact", description="products with rounded weights on a CPU: activations in fp32, or rounded to 8 bits, faster"
    )

    def availability(self) -> Availability:
        """Needs the package, and for CUDA and TensorRT also that provider in it and a GPU."""
        found = machine.installed("onnxruntime", extra="cpu" if self.provider == "cpu" else "gpu")
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
        """Name the artifact's own graph, or lower its 8-bit products for a CPU into a graph of this target."""
        model = load_graph(graph.path)
        if multiply_out(model):
            graph = replace(graph, path=folder / "multiplied.onnx")
            save(model, graph.path)
        products = sum(1 for _ in static_products(model))
        if products and self.provider == "cpu" and not (graph.untouched and self.int8 in ("auto", "static")):
            return self.lower(model, products, graph, folder)
        session, left_out = self.opened(graph.path, graph.threads)  # refuses here what it would refuse later
        notes = [f"ONNX Runtime itself fails on this graph unless its {left_out} is off, so it is"] if left_out else []
        notes += nodes_elsewhere(session, PROVIDERS[self.provider])
        resolved = {}
        if products and self.provider == "cpu":
            resolved = {"int8": "static"}
            notes.append("8-bit products as the file holds them: no step asked for another form")
        if bits := bits_of_weights(model):
            notes.append(WEIGHTS_ONLY[bits, self.weights_only])
        reads = choose(graph.path, folder, links=graph.links)
        return Built(resolved=resolved, notes=tuple(notes), reads=reads, left_out=left_out)

    def lower(self, model: ir.Model, products: int, graph: Graph, folder: Path) -> Built:
        """Choose the form of the 8-bit products, write it, and say why and what 8 bits bring over fp32 here."""
        notes: list[str] = []
        forms = {"static": graph.path, "dynamic": folder / "dynamic.onnx", "fp32": folder / "fp32.onnx"}
        marked = {path for path, hint in graph.hints.items() if hint.reduced_range}
        if marked and machine.int8_saturates():
            count = reduce_range(model, marked)
            notes.append(
                f"{count} of {products} 8-bit layers have 7-bit weights: "
                "this processor's 8-bit product would saturate in them"
            )
            forms["static"] = folder / "static.onnx"
            save(model, forms["static"])
        rows = {path for path, hint in graph.hints.items() if hint.rows}
        for name, rewrite in (("dynamic", partial(to_dynamic, rows=rows)), ("fp32", to_float)):
            copy = model.clone()
            rewrite(copy)
            save(copy, forms[name])
        notes += self.round_outputs(model, forms, graph, folder / "rounded.onnx")
        graph.say("timing 8-bit products, static and dynamic, and fp32")
        sessions = {name: self.session(path, graph.threads) for name, path in forms.items()}
        seconds = self.race(sessions, graph)
        form: str = self.int8
        if form == "auto":
            form, why = self.choose_form(sessions, seconds, graph)
            notes.append(why)
        share = seconds[form] / seconds["fp32"]
        outcome = f"8 bits took {share:.2f} of the time of the same graph in fp32 in ONNX Runtime"
        notes.append(outcome if share < 1 else f"8 bits are NOT faster than fp32 here: {outcome}")
        reads = choose(forms[form], folder, links=graph.links)
        return Built(resolved={"int8": form}, notes=tuple(notes), reads=reads, fp32_ratio=share)

    def choose_form(self, sessions: Mapping[str, Any], seconds: Mapping[str, float], graph: Graph) -> tuple[str, str]:
        """The faster 8-bit form, unless it is much further from fp32 than the other; and a sentence about it."""
        errors = errors_of({name: sessions[name] for name in ("static", "dynamic")}, sessions["fp32"], graph)
        faster, other = sorted(errors, key=lambda name: seconds[name])
        share = seconds["dynamic"] / seconds["static"]
        taken = f"the dynamic form took {share:.2f} of the static form's time"
        if 1 - ALIKE < share < 1 + ALIKE:
            closer, further = sorted(("static", "dynamic"), key=lambda name: errors[name])
            error = f"its relative error is {errors[closer]:.2g}, not {errors[further]:.2g}"
            return closer, f"{closer} 8-bit products: {error}, and {taken}, which timing cannot tell apart"
        if errors[faster] > FAR and errors[faster] > FURTHER * errors[other]:
            error = f"the {faster} form's relative error is {errors[faster]:.2g}, not {errors[other]:.2g}"
            return other, f"{other} 8-bit products: {error} ({taken})"
        return faster, f"{faster} 8-bit products: {taken}"

    def round_outputs(self, model: ir.Model, forms: dict[str, Path], graph: Graph, path: Path) -> list[str]:
        """Round the outputs of convolutions in the static form, unless that costs more than all its 8 bits do."""
        copy = model.clone()
        count = add_output_pairs(copy, graph.hints)
        if not count:
            return []
        save(copy, path)
        static, rounded, exact = (self.session(form, graph.threads) for form in (forms["static"], path, forms["fp32"]))
        before, after = errors_of({"static": static, "rounded": rounded}, exact, graph).values()
        if after > 2 * before:
            return [
                f"{count} convolutions compute in floats, from 8-bit weights: in 8 bits with rounded outputs "
                f"the relative error of the graph would be {after:.2g}, not {before:.2g}"
            ]
        forms["static"] = path
        return [
            f"{count} convolutions: in 8 bits with rounded outputs in the static form, "
            "in floats from 8-bit weights in the dynamic form"
        ]

    def race(self, sessions: Mapping[str, Any], graph: Graph) -> dict[str, float]:
        """Median seconds of each graph on an example, taken in turns, each after one untimed call."""
        taken: dict[str, list[float]] = {form: [] for form in sessions}
        began = time.perf_counter()
        for done in range(RACE_ROUNDS):
            if done >= RACE_FEWEST and time.perf_counter() - began > RACE_S:
                break
            for form, session in sessions.items():
                session.run(None, graph.examples[0])
                start = time.perf_counter()
                session.run(None, graph.examples[0])
                taken[form].append(time.perf_counter() - start)
        return {form: float(np.median(seconds)) for form, seconds in taken.items()}

    def session(self, path: Path, threads: int) -> Any:
        """An inference session; a graph that ONNX Runtime refuses is a ``ToolchainError`` with its reason."""
        return self.opened(path, threads)[0]

    def opened(self, path: Path, threads: int) -> tuple[Any, str]:
        """An inference session, and which of its optimizers had to be left out because it fails on the graph."""
        runtime = require("onnxruntime", extra="cpu")
        model = check_onnx(path)
        without = disabled_optimizers(model)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        for option, value in options_for_weights(ir.from_proto(model), self.weights_only).items():
            options.add_session_config_entry(option, value)
        if self.provider != "cpu":
            options.add_session_config_entry(ASSIGNMENT, "1")
        refusals: list[Exception] = []
        for left_out in ("", *FAILING_OPTIMIZERS):
            disabled = [*without, *([left_out] if left_out else [])]
            if left_out == EVERY_OPTIMIZER:
                options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            try:
                providers = [PROVIDERS[self.provider]]
                session = runtime.InferenceSession(path, options, providers=providers, disabled_optimizers=disabled)
            except Exception as cause:  # onnxruntime raises pybind classes of no common base
                refusals.append(cause)
            else:
                refuse_another(session, PROVIDERS[self.provider])
                session.disable_fallback()  # a call that fails on an accelerator would go on with the CPU
                return session, left_out
        first = refusals[0]
        raise ToolchainError(f"ONNX Runtime refuses the graph: {str(first).splitlines()[0]}") from first

    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module] | None = None) -> Runner:
        """Ready the graph that ``engine.json`` names."""
        del module
        named = read_setting(folder / ENGINE, "graph", str)
        path = (folder / named).resolve()
        if not path.is_relative_to(folder.resolve().parent.parent):
            raise ToolchainError(f"engine.json names {named!r}, outside the artifact; refused", where=str(folder))
        return self.open(path, threads)

    def open(self, path: Path, threads: int) -> Runner:
        """Ready any ONNX file."""
        return SessionRunner(self.session(path, threads), path, device=CPU if self.provider == "cpu" else CUDA)


def disabled_optimizers(model: Any) -> list[str]:
    """Optimizers of ONNX Runtime that a graph is loaded without, by its opset."""
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    # From opset 21 on it writes pairs without a zero point that ONNX Runtime 1.32 itself refuses.
    return ["QDQPropagationTransformer"] if opset >= 21 else []


class SessionRunner:
    """Runs an ONNX Runtime session on named arrays, or on named tensors of its device, and answers in kind.

    Args:
        session: ready.
        path: its graph.
        device: where it runs.
    """

    def __init__(self, session: Any, path: Path, *, device: str = CPU) -> None:
        self.session, self.path, self.device = session, path, device
        self.clock = clock_on(device if has_cuda().yes else CPU)  # a call returns when its work is done
        self.inputs = {value.name for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]

    @property
    def to_device(self) -> ToDevice | None:
        """Named arrays -> named tensors there; None where PyTorch has no CUDA, or ONNX Runtime takes no DLPack yet."""
        if not (has_cuda().yes and hasattr(require("onnxruntime", extra="cpu").OrtValue, "from_dlpack")):
            return None
        return lambda inputs: dict(tensors_on(self.device, inputs))

    def __call__(self, inputs: Values) -> Values:
        """Named inputs -> named outputs; inputs that the graph folded away are left out."""
        given = {name: value for name, value in inputs.items() if name in self.inputs}
        try:
            if holds_tensors(given):
                return dict(self.bound({name: tensor_of(value) for name, value in given.items()}))
            found = self.session.run(None, given)
        except Exception as cause:  # onnxruntime raises pybind classes of no common base
            raise self.refusal(given, cause) from cause
        return dict(zip(self.outputs, found, strict=True))

    def bound(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs as tensors on the runner's device; inputs and outputs share their memory with ONNX Runtime."""
        values: Any = require("onnxruntime", extra="cpu").OrtValue
        binding = self.session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, values.from_dlpack(tensor.detach().to(self.device).contiguous()))
        kind, _, number = self.device.partition(":")
        for name in self.outputs:
            binding.bind_output(name, kind, int(number or 0))
        written(self.device)  # ONNX Runtime has a stream of its own, and waits for no other
        self.session.run_with_iobinding(binding)
        return dict(zip(self.outputs, map(from_dlpack, binding.get_outputs()), strict=True))

    def refusal(self, inputs: Values, cause: Exception) -> ToolchainError:
        """The error for a call that the session does not take, with the dimensions by name."""
        given = {value.name: inputs[value.name].shape for value in self.session.get_inputs() if value.name in inputs}
        sizes = {
            dim: size
            for value in self.session.get_inputs()
            for dim, size in zip(value.shape, given.get(value.name, ()), strict=False)
            if isinstance(dim, str)
        }
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in given.items())
        at = ", ".join(f"{dim} = {size}" for dim, size in sizes.items())
        said = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        return ToolchainError(
            f"ONNX Runtime cannot run the graph at {at or 'these sizes'} ({shapes}): {said}",
            help="call it with sizes that the model takes",
        )

    def first_non_finite(self, inputs: Arrays) -> str:
        """Module path, or node name, of the first value in the graph that is not finite; empty when all are.

        Runs the unoptimized graph on the CPU with every float value as an output.
        """
        inputs = on_host({name: tensor_of(value) for name, value in inputs.items()})
        model = load_graph(self.path)
        nodes = {
            value.name: node
            for node in model.graph
            for value in node.outputs
            if value.name and value.dtype is not None and value.dtype.is_floating_point()
        }
        model.graph.outputs[:] = [value for node in nodes.values() for value in node.outputs if value.name in nodes]
        threads = self.session.get_session_options().intra_op_num_threads
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "model.onnx"
            save(model, copy)
            values = unoptimized(copy, threads)(inputs)
        for name, value in values.items():
            if not np.isfinite(value).all():
                return module_path(nodes[name]) or nodes[name].name or name
        return ""


def bits_of_weights(model: ir.Model) -> int:
    """Bits of the whole numbers that weights are rounded to where nothing else is: 4, 8, or 0 for none such.

    ONNX Runtime has a fast product in floats for 4 bits, so that those count where both are there.
    """
    kinds = {node.inputs[0].dtype for node in model.graph if node.op_type == "DequantizeLinear" and node.inputs[0]}
    if kinds & {ir.DataType.INT4, ir.DataType.UINT4}:
        return 4
    rounds = any(node.op_type == "QuantizeLinear" for node in model.graph)
    return 8 if not rounds and kinds & {ir.DataType.INT8, ir.DataType.UINT8} else 0


def options_for_weights(model: ir.Model, form: str) -> dict[str, str]:
    """Options of a session that compute products with rounded weights in a form; none where there are no such."""
    bits = bits_of_weights(model)
    if bits == 8 and form == "exact":
        return {FOLDING_OPTION: "1"}
    return {ACCURACY_OPTION: ACCURACY[form]} if bits else {}


def unoptimized(path: Path, threads: int) -> SessionRunner:
    """An ONNX file in ONNX Runtime on the CPU as it is written, without any rewriting.

    Raises:
        ToolchainError: ONNX Runtime refuses it.
    """
    runtime = require("onnxruntime", extra="cpu")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as cause:  # as above
        raise ToolchainError(f"ONNX Runtime refuses the graph: {str(cause).splitlines()[0]}") from cause
    return SessionRunner(session, path)


def refuse_another(session: Any, wanted: str) -> None:
    """Raise where a session does not run on what was asked for: ONNX Runtime falls back to the CPU without a word."""
    found = session.get_providers()
    if wanted not in found:
        raise UnavailableError(
            f"ONNX Runtime was asked for {wanted} and took {', '.join(found) or 'nothing'}",
            help="its own log says why: often a library of the accelerator is missing (enginewright doctor)",
        )


def nodes_elsewhere(session: Any, wanted: str) -> list[str]:
    """A note on how many nodes run on another provider than was asked for, where the session can say so.

    Some always do: ONNX Runtime itself keeps what computes shapes on the CPU.
    """
    if wanted == PROVIDERS["cpu"]:
        return []
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return [f"this ONNX Runtime cannot say whether every node runs on {wanted}"]
    nodes = [(part.ep_name, node.op_type) for part in ask() for node in part.get_nodes()]
    away = Counter(operator for provider, operator in nodes if provider != wanted)
    if not away:
        return []
    where = ", ".join(sorted({provider for provider, _ in nodes if provider != wanted}))
    kinds = ", ".join(f"{count} {operator}" for operator, count in away.most_common())
    return [f"{away.total()} of {len(nodes)} nodes do not run on {wanted} but on {where}: {kinds}"]


def keep_only(path: Path, folder: Path) -> None:
    """Remove the graphs that were tried and not chosen, and weights that only they read."""
    for tried in folder.glob("*.*"):
        if tried.is_file() and tried.stem != path.stem:
            tried.unlink()
    if not (path.parent == folder and external_bytes(path, linked=True)):
        shutil.rmtree(folder / LINKED, ignore_errors=True)


def errors_of(sessions: Mapping[str, Any], exact: Any, graph: Graph) -> dict[str, float]:
    """For each session the largest relative L2 error of its outputs beside those of ``exact``, over the examples."""
    errors = dict.fromkeys(sessions, 0.0)
    for call in graph.examples:
        wanted = exact.run(None, call)
        for name, session in sessions.items():
            pairs = zip(wanted, session.run(None, call), strict=True)
            errors[name] = max(errors[name], *(relative_l2(*pair) for pair in pairs))
    return errors


def stand_alone(path: Path) -> None:
    """Write a graph's weights into one file of its own: only what it reads, and no links, which the checker refuses."""
    if not external_bytes(path, linked=True):
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        save(load_graph(path), Path(folder) / path.name, embed=True)
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    shutil.rmtree(path.parent / LINKED)


def choose(path: Path, folder: Path, *, links: bool) -> tuple[Path, ...]:
    """Write which graph this engine is, one of its own or the artifact's; files outside its folder that it reads."""
    keep_only(path, folder)
    if path.parent == folder and not links:
        stand_alone(path)
    (folder / ENGINE).write_text(json.dumps({"graph": os.path.relpath(path, folder)}) + "\n")
    return () if path.parent == folder else files_of(path)
