"""From a PyTorch module to an ONNX file whose weights lie in a safetensors file beside it.

Nothing of this machine stays in the file: the exporter's stack traces go, the name of each node's module stays (under
the metadata key ``module``). The same module and inputs give the same bytes.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from toolchain.errors import ToolchainError

OPSET = 20
"""Newest opset without the fused Attention operator, which TensorRT-RTX builds in some shapes only."""

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
}


def export_onnx(
    module: nn.Module,
    example: Mapping[str, Tensor],
    *,
    dynamic: Mapping[str, Mapping[int, tuple[str, int, int]]],
    outputs: Sequence[str],
    path: Path,
    opset: int = OPSET,
) -> None:
    """Write ``path`` and, beside it, its weights with the suffix ``.safetensors``.

    Args:
        module: in eval mode.
        example: inputs by name; each dynamic dimension at least 2, or the tracer takes it for a constant.
        dynamic: for each input, the dimensions that may change, as (name, smallest, largest).
        outputs: names for what the module returns.
        path: the ONNX file.
        opset: ONNX operator set.

    Raises:
        ToolchainError: the module cannot be traced or translated, or a dynamic dimension came out fixed.
    """
    dims = {
        name: torch.export.Dim(name, min=low, max=high) for by in dynamic.values() for name, low, high in by.values()
    }
    shapes = {name: {axis: dims[dim[0]] for axis, dim in dynamic.get(name, {}).items()} for name in example}
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                module,
                args=(),
                kwargs=dict(example),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=list(example),
                output_names=list(outputs),
                custom_translation_table={torch.ops.aten.squeeze.dim: squeeze, operator.floordiv: floor_divide},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as cause:
        first = next((line for line in reversed(str(cause.__cause__ or cause).splitlines()) if line.strip()), "")
        raise ToolchainError(
            f"the model could not be exported to ONNX: {first.strip()}",
            help="an operation or a data-dependent branch stands in the way; the cause names it",
        ) from cause
    assert program is not None
    model = program.model
    found = model.opset_imports.get("")
    if found != opset:
        raise ToolchainError(f"asked for ONNX opset {opset}, the exporter wrote {found}", help=f"use opset {OPSET}")
    refuse_frozen(model, dynamic)
    scrub(model)
    save(model, path)


def refuse_frozen(model: ir.Model, dynamic: Mapping[str, Mapping[int, tuple[str, int, int]]]) -> None:
    """The exporter may take a dynamic dimension for a constant without a word; the engine would then fail elsewhere."""
    for value in model.graph.inputs:
        assert value.shape is not None
        for axis, (name, _, _) in dynamic.get(value.name or "", {}).items():
            if isinstance(value.shape[axis], int):
                raise ToolchainError(
                    f"the exporter fixed dimension {name!r} of {value.name!r} at {value.shape[axis]}",
                    help="something in the model holds for that size alone; make the dimension fixed in its inputs",
                )


def squeeze(x: ir.Value, dim: int) -> Any:
    """Leave a dimension that is not 1, as PyTorch does; the exporter's own translation writes an invalid Squeeze."""
    import onnxscript

    op: Any = onnxscript.opset18  # its methods are typed for scripts, which this is not
    assert x.shape is not None
    return op.Squeeze(x, op.Constant(value_ints=[dim])) if x.shape[dim] == 1 else op.Identity(x)


def floor_divide(a: Any, b: Any) -> Any:
    """Round sizes down, as Python does; the exporter's own translation rounds negative ones, as in a crop, up."""
    import onnxscript

    op: Any = onnxscript.opset18
    return op.Div(op.Sub(a, op.Mod(a, b)), b)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hold back the exporter's chatter about libraries that are not there and parameters that it renames."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
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


def save(model: ir.Model, path: Path) -> None:
    """Write the graph, and its larger initializers to the safetensors file beside it, streamed one by one."""
    common.RemoveUnusedNodesPass()(model)
    model.producer_version = (model.producer_version or "").partition("+")[0]
    large = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes >= INLINE_BYTES
        and value.const_value.dtype in SAFETENSORS_TYPES
    }
    if large:
        write_external(large, path.with_suffix(".safetensors"))
    ir.save(model, path)
    onnx.checker.check_model(path)


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
        shape = [int(size) for size in tensor.shape]
        header[name] = {"dtype": SAFETENSORS_TYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 4096)  # weights start on a page
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensors[name].tofile(file)
    for name in order:
        tensor = tensors[name]
        values[name].const_value = ir.ExternalTensor(
            path.name,
            8 + len(text) + header[name]["data_offsets"][0],
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=path.parent,
        )
