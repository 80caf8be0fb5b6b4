"""From a PyTorch module to an ONNX file whose weights lie in safetensors files beside it.

Weights that are on disk already are not written again: their file is linked into the folder ``weights`` beside the
graph (ONNX allows no path that leaves the graph's folder, and no symbolic link), which costs no space. Across file
systems, where no link can be, it is copied. Whether links stay in an artifact is decided afterwards: ``weights.py``.

Nothing of this machine stays in the file: the exporter's stack traces go, the name of each node's module stays (under
the metadata key ``module``). The same module and inputs give the same bytes.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.targets import stored, translations
from enginewright.targets.dimensions import Axes, called_plainly, conclusions_heard, declared, refuse_narrowed
from enginewright.targets.element_types import hollow, in_type, keep_interface, restore
from enginewright.targets.exporter_errors import refusal
from enginewright.targets.four_bits import pack
from enginewright.targets.simplify import simplify
from enginewright.targets.weights import LINKED, check, link

OPSET = 20
"""Newest opset without the fused Attention operator, which TensorRT-RTX builds in some shapes only."""

NEWEST_TRACED = 22
"""Newest opset that models are traced for; later ones join attention into one operator. A graph that holds a later
type gets the later number afterwards: the operators that are there only learned more types."""

CHATTER = (
    "torch.onnx",
    "torch.export",
    "torch._dynamo",
    "torch._guards",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
)
"""Loggers that tell of every attempt; what matters of it is in the error."""

INLINE_BYTES = 1024
"""Smaller initializers stay in the graph, where shape inference can read them."""

SAFETENSORS_TYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.DOUBLE: "F64",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT16: "I16",
    ir.DataType.INT32: "I32",
    ir.DataType.INT64: "I64",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT8E5M2: "F8_E5M2",
    ir.DataType.INT4: "U8",  # two in a byte
    ir.DataType.FLOAT4E2M1: "U8",
}


def export_onnx(
    module: nn.Module,
    example: Mapping[str, Tensor],
    *,
    dynamic: Axes,
    outputs: Sequence[str],
    path: Path,
    embed: bool = False,
    dtype: torch.dtype | None = None,
    opset: int = OPSET,
) -> None:
    """Write ``path`` and, beside it, new weights with the suffix ``.safetensors``; weights on disk are linked.

    Args:
        module: in eval mode.
        example: inputs by name; each dynamic dimension at least 2, or the tracer takes it for a constant.
        dynamic: for each input, the dimensions that may change, as (name, smallest, largest) or with a fourth number
            that every size is a multiple of.
        outputs: names for what the module returns; what it returns beside tensors is left out.
        path: the ONNX file.
        embed: write all weights beside the graph, those on disk too.
        dtype: floating type to compute in; inputs and outputs keep theirs. None: as the module is.
        opset: ONNX operator set; a module that needs a later one says so by an ``onnx_opset``.

    Raises:
        ToolchainError: the module cannot be traced or translated, or does not hold for the dimensions' whole ranges.
    """
    wanted = max(opset, *(getattr(part, "onnx_opset", 0) for part in module.modules()))
    opset = max(opset, min(wanted, NEWEST_TRACED))
    traced, inputs = module, dict(example)
    originals: dict[int, Tensor] = {}
    if dtype is not None:
        traced, originals = hollow(module, dtype)
        inputs = in_type(example, dtype)
    program = trace(traced, inputs, dynamic, outputs, opset)

    def conclusions() -> list[str]:
        with conclusions_heard() as heard:
            trace(traced, inputs, dynamic, outputs, opset)
        return heard

    refuse_narrowed(program.exported_program, dynamic, conclusions)
    model = program.model
    found = model.opset_imports.get("")
    if found != opset:
        raise ToolchainError(f"asked for ONNX opset {opset}, the exporter wrote {found}", help=f"use opset {OPSET}")
    if wanted > opset:
        model.opset_imports[""], model.ir_version = wanted, max(model.ir_version, 11)
    refuse_frozen(model, dynamic)
    pack(model)
    if dtype is not None:
        restore(model, originals, dtype, stays=lambda value: not embed and place_of(value) is not None)
        keep_interface(model, example, ir.DataType.FLOAT)
    optimize(model, embed=embed)
    scrub(model)
    save(model, path, embed=embed)


def trace(
    module: nn.Module, inputs: Mapping[str, Tensor], dynamic: Axes, outputs: Sequence[str], opset: int
) -> torch.onnx.ONNXProgram:
    """The exporter's program of a module, not yet simplified.

    Raises:
        ToolchainError: it cannot be traced or translated.
    """
    try:
        with quiet_exporter(), torch.no_grad(), called_plainly(module, dynamic, list(inputs)):
            program = torch.onnx.export(
                module,
                args=(),
                kwargs=dict(inputs),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=declared(dynamic, inputs),
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table=translations.table(),
                verbose=False,
                optimize=False,  # it would write transposed copies of weights that are on disk
            )
    except torch.onnx.errors.OnnxExporterError as cause:
        raise refusal(cause) from cause
    assert program is not None
    return program


def optimize(model: ir.Model, *, embed: bool) -> None:
    """Fold small constants and drop what is redundant; weights that lie on disk stay as they are, also transposed."""

    def should_fold(node: ir.Node) -> bool | None:
        reads = [value for value in node.inputs if value is not None and value.const_value is not None]
        large = [value for value in reads if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES]
        return False if not embed and any(place_of(value) for value in large) else None

    simplify(model, should_fold=should_fold)


def refuse_frozen(model: ir.Model, dynamic: Axes) -> None:
    """The exporter may take a dynamic dimension for a constant without a word; the engine would then fail elsewhere."""
    for value in model.graph.inputs:
        assert value.shape is not None
        for axis, (name, low, high, *_) in dynamic.get(value.name or "", {}).items():
            if low < high and isinstance(value.shape[axis], int):
                raise ToolchainError(
                    f"the exporter fixed dimension {name!r} of {value.name!r} at {value.shape[axis]}",
                    help="something in the model holds for that size alone; fix the dimension: with "
                    f"'?{name}={value.shape[axis]}' behind an hf: or onnx: model, in the inputs of a py: model",
                )


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hold back the exporter's chatter: libraries that are not there, and graphs and tracebacks of what it tried."""
    logs = [logging.getLogger(name) for name in CHATTER]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(max(log.level, logging.CRITICAL) if log.level != logging.INFO else logging.INFO)
    try:
        heard = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def scrub(model: ir.Model) -> None:
    """Take out what the exporter wrote about this machine; keep each node's module path."""
    model.metadata_props.clear()
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in ir.traversal.RecursiveGraphIterator(graph):
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
            node.metadata_props.clear()
            node.doc_string = None
            if len(scopes) > 1:
                node.metadata_props["module"] = scopes[-2]
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def module_path(node: ir.Node) -> str:
    """Path of the module that a node came from; empty for the outermost."""
    return node.metadata_props.get("module", "")


def save(model: ir.Model, path: Path, *, embed: bool = False) -> None:
    """Write the graph; its larger initializers are linked where they lie on disk, others streamed to a file."""
    common.RemoveUnusedNodesPass()(model)
    model.producer_version = (model.producer_version or "").partition("+")[0]
    large = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes >= INLINE_BYTES
        and value.const_value.dtype in SAFETENSORS_TYPES
    }
    places = {} if embed else {name: place for name, value in large.items() if (place := place_of(value))}
    point_at(model.graph.initializers, places, path.parent)
    if rest := {name: value for name, value in large.items() if name not in places}:
        write_external(rest, path.with_suffix(".safetensors"))
    take_in(model, apart=set(large.values()))
    ir.save(model, path)
    check(path)


def take_in(model: ir.Model, *, apart: set[ir.Value]) -> None:
    """Put what a graph was read with from other files, but for ``apart``, into the graph: small ones, and branches'."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor: Any = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and value not in apart:
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def place_of(value: ir.Value) -> stored.Place | None:
    """Where on disk an initializer lies, in a file that may be linked: a source's, or one linked before."""
    constant: Any = value.const_value
    if isinstance(constant, ir.ExternalTensor):
        found = Path(constant.base_dir) / constant.location
        if found.parent.name != LINKED or constant.offset is None or constant.length is None:
            return None
        return stored.Place(found, constant.offset, constant.length)
    raw = getattr(constant, "raw", None)
    return stored.place_of(raw) if isinstance(raw, Tensor) else None


def point_at(values: Mapping[str, ir.Value], places: Mapping[str, stored.Place], folder: Path) -> None:
    """Link the files of ``places`` into ``folder`` and let the initializers point into them."""
    files = link({place.path for place in places.values()}, folder / LINKED) if places else {}
    for name, place in places.items():
        tensor: Any = values[name].const_value
        values[name].const_value = ir.ExternalTensor(
            f"{LINKED}/{files[place.path]}",
            place.offset,
            place.bytes,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=folder,
        )


def write_external(values: Mapping[str, ir.Value], path: Path) -> None:
    """Stream initializers into a safetensors file, widest elements first so that all lie aligned, and point at it."""
    tensors: dict[str, Any] = {
        name: value.const_value for name, value in values.items()
    }  # ir types its tensors loosely
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        shape = [int(size) for size in tensor.shape] if tensor.dtype.bitwidth >= 8 else [tensor.nbytes]
        header[name] = {"dtype": SAFETENSORS_TYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    begin = stored.header_bytes(header)
    with path.open("wb") as file:
        file.write(begin)
        for name in order:
            tensors[name].tofile(file)
    for name in order:
        tensor = tensors[name]
        values[name].const_value = ir.ExternalTensor(
            path.name,
            len(begin) + header[name]["data_offsets"][0],
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=path.parent,
        )
