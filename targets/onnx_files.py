"""Reading ONNX files that others wrote: whole, really ONNX, and with weights that lie where they should."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data

from enginewright.ground.errors import ToolchainError


def check_onnx(path: Path) -> onnx.ModelProto:
    """Read a graph without its external weights, and check where those lie before anything maps them.

    Raises:
        ToolchainError: not there, cut short, not ONNX, or its external data leaves the folder or the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise ToolchainError(f"{path.name!r} is no file, and no ONNX file", where=str(path))
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as cause:
        raise ToolchainError(f"there is no ONNX file {path.name!r}", where=str(path)) from cause
    except OSError as cause:
        raise ToolchainError(f"{path.name} cannot be read: {cause.strerror}", where=str(path)[:200]) from cause
    except (DecodeError, RecursionError, ValueError) as cause:
        raise ToolchainError(
            f"{path.name} is not an ONNX file, or was cut short", where=str(path), help="export or copy it again"
        ) from cause
    if not model.graph.node or not model.opset_import:
        raise ToolchainError(f"{path.name} holds no ONNX graph", where=str(path), help="export or copy it again")
    for tensor in all_tensors(model):
        if uses_external_data(tensor):
            check_location(tensor, path)
    return model


def all_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor that may hold external data: initializers and attributes, subgraphs and functions included."""
    found: list[onnx.TensorProto] = []

    def from_nodes(nodes: object) -> None:
        for node in nodes:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                found.extend((attribute.t, *attribute.tensors))
                for graph in (attribute.g, *attribute.graphs):
                    found.extend(graph.initializer)
                    from_nodes(graph.node)

    found.extend(model.graph.initializer)
    from_nodes(model.graph.node)
    for function in model.functions:
        from_nodes(function.node)
    return found


def external_files(model: onnx.ModelProto) -> set[str]:
    """Paths, from the graph's folder, of the files that hold its external data."""
    return {
        entry.value
        for tensor in all_tensors(model)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def external_bytes(path: Path, *, linked: bool = False) -> int:
    """Bytes that a graph reads from other files; with ``linked`` from those in other folders only."""
    entries = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in all_tensors(onnx.load(path, load_external_data=False))
    ]
    return sum(int(entry.get("length", 0)) for entry in entries if not linked or "/" in entry.get("location", ""))


def files_of(path: Path) -> tuple[Path, ...]:
    """A graph's file and those that hold its external data."""
    model = onnx.load(path, load_external_data=False)
    return path, *(path.parent / location for location in sorted(external_files(model)))


def check_location(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse external data outside the graph's folder, behind a link that leaves it, or past the end of its file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    try:
        file = (folder / location).resolve()
        missing = not file.is_file()
    except (OSError, RuntimeError, ValueError) as cause:  # too long, links in a circle, a NUL
        where = f"{path}, tensor {tensor.name[:80]!r}"
        raise ToolchainError(f"external data at {location[:80]!r} cannot be found", where=where) from cause
    where = f"{path}, tensor {tensor.name!r}"
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise ToolchainError(
            f"external data at {location!r} lies outside the model's folder; refused",
            where=where,
            help="keep the weights beside the ONNX file",
        )
    if missing:
        raise ToolchainError(f"external data file {location!r} is missing", where=where)
    try:
        offset, length = (int(entries.get(key, "0")[:20]) for key in ("offset", "length"))
    except ValueError as cause:
        raise ToolchainError(
            f"external data of {tensor.name!r} has an offset that is no number", where=where
        ) from cause
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise ToolchainError(
            f"external data of {tensor.name!r} ends at byte {offset + length}, "
            f"but {location!r} has {file.stat().st_size}",
            where=where,
            help="the weights were cut short; copy them again",
        )
