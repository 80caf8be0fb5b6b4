"""Where the weights that lay on disk before an export come to lie: copied into the folder, or linked there.

While graphs are written, the files that they point into are linked beside them, which takes neither time nor space.
At the end the links become copies of what the graphs read, so that the folder can be copied and moved, keeps what it
holds when the checkpoint is saved over in place, and passes ONNX's checker, which refuses files with two names. Copies
are made by the kernel, which shares blocks where the file system can, or else in small pieces. Of a large checkpoint
the links stay.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import onnx
import onnx_ir as ir
from onnx.external_data_helper import uses_external_data

from enginewright.ground.errors import ToolchainError
from enginewright.targets import stored
from enginewright.targets.onnx_files import all_tensors, external_files

Mode = Literal["auto", "copy", "link"]

LINKED = "weights"
"""Folder beside a graph with the weight files that were on disk before."""

COPIED_UP_TO = 2 * 10**9
"""Bytes of weights that are copied unless the user says otherwise."""

MOSTLY = 0.9
"""Share of a file from which on the whole file is copied: its offsets stay, and its blocks can be shared."""

PIECE = 1 << 20

NO_KERNEL_COPY = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EXDEV)


class Range(NamedTuple):
    """A stretch of a file."""

    start: int
    end: int


def link(paths: Iterable[Path], folder: Path) -> dict[Path, str]:
    """Link files into ``folder``, or copy them where no link can be; the name that each has there."""
    folder.mkdir(exist_ok=True)
    names: dict[Path, str] = {}
    for path in sorted(paths):
        name, number = path.name, 1
        while (folder / name).exists() and not (folder / name).samefile(path):
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        if not (folder / name).exists():
            try:
                os.link(path.resolve(), folder / name)
            except OSError:
                copy_ranges(path, folder / name, [Range(0, path.stat().st_size)], b"")
        names[path] = name
    return names


def settle_weights(folder: Path, mode: Mode) -> tuple[bool, str]:
    """Copy what the graphs in a folder read from linked files, or leave the links.

    Args:
        folder: the graphs, and ``weights`` beside them.
        mode: copy, link, or copy up to ``COPIED_UP_TO`` bytes.

    Returns:
        Whether weights are linked, and a sentence about that for the report; empty where none are.
    """
    graphs = {path: onnx.load(path, load_external_data=False) for path in sorted(folder.glob("*.onnx"))}
    read: dict[str, set[Range]] = {}
    for graph in graphs.values():
        for tensor in outside_tensors(graph):
            read.setdefault(location_of(tensor), set()).add(range_of(tensor))
    remove_unread(folder / LINKED, {Path(name).name for name in read})
    if not read:
        return False, ""
    size = sum(range_.end - range_.start for ranges in read.values() for range_ in ranges)
    if mode == "link" or (mode == "auto" and size > COPIED_UP_TO):
        if not any(has_other_name(folder / name) for name in read):
            return False, ""  # on another file system, where they were copied already
        return True, (
            f"{size / 1e9:.3g} GB of weights are linked, not copied: the folder shares files with the checkpoint. "
            "Saving over the checkpoint in place changes it, and onnx.checker refuses files with two names; for a "
            "folder that can be copied: --weights copy"
        )
    moved = {name: copied(folder / name, ranges) for name, ranges in read.items()}
    for path, graph in graphs.items():
        if any(moved[location_of(tensor)] for tensor in outside_tensors(graph)):
            for tensor in outside_tensors(graph):
                point_to(tensor, moved[location_of(tensor)])
            path.write_bytes(graph.SerializeToString(deterministic=True))
    return False, ""


def remove_unread(folder: Path, read: set[str]) -> None:
    """Remove linked files that no graph reads any more."""
    if folder.is_dir():
        for file in folder.iterdir():
            if file.name not in read:
                file.unlink()
        if not read:
            folder.rmdir()


def outside_tensors(graph: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The tensors that a graph reads from ``weights``."""
    found = [tensor for tensor in all_tensors(graph) if uses_external_data(tensor)]
    return [tensor for tensor in found if location_of(tensor).startswith(f"{LINKED}/")]


def entry_of(tensor: onnx.TensorProto, key: str, default: str) -> str:
    """One entry of a tensor's external data."""
    return next((entry.value for entry in tensor.external_data if entry.key == key), default)


def location_of(tensor: onnx.TensorProto) -> str:
    """The file that a tensor lies in, from the graph's folder."""
    return entry_of(tensor, "location", "")


def range_of(tensor: onnx.TensorProto) -> Range:
    """Where in its file a tensor lies."""
    start = int(entry_of(tensor, "offset", "0"))
    return Range(start, start + int(entry_of(tensor, "length", "0")))


def point_to(tensor: onnx.TensorProto, moved: Mapping[int, int]) -> None:
    """Let a tensor begin where its bytes were copied to."""
    for entry in tensor.external_data:
        if entry.key == "offset" and moved:
            entry.value = str(moved[int(entry.value)])


def copied(path: Path, ranges: set[Range]) -> dict[int, int]:
    """Put a copy in the place of a linked file: of the tensors that are read, or of the whole where that is most of it.

    Returns:
        By its offset in the old file, where each range begins now; empty where all stay.
    """
    size = path.stat().st_size
    parts = parts_read(path, ranges)
    whole = parts is None or sum(part.end - part.start for part, _ in parts) >= MOSTLY * size
    if whole and not has_other_name(path):
        return {}
    new = path.with_name(f".{path.name}")
    if whole or parts is None:
        copy_ranges(path, new, [Range(0, size)], b"")
        new.replace(path)
        return {}
    header = header_of(parts)
    copy_ranges(path, new, [part for part, _ in parts], header)
    new.replace(path)
    begins: dict[int, int] = {}
    at = len(header)
    for part, _ in parts:
        begins |= {start: at + start - part.start for start, end in ranges if part.start <= start and end <= part.end}
        at += part.end - part.start
    return begins


def parts_read(path: Path, ranges: set[Range]) -> list[tuple[Range, dict[str, Any]]] | None:
    """The tensors of a safetensors file that ranges lie in, widest elements first; None where that cannot be said."""
    try:
        entries, begin = stored.read_header(path)
        parts = sorted(
            (Range(begin + entry["data_offsets"][0], begin + entry["data_offsets"][1]), name, entry)
            for name, entry in entries.items()
        )
    except (ToolchainError, KeyError, TypeError, IndexError):
        return None  # not safetensors: another program's external data
    starts = [part.start for part, _, _ in parts]
    found: dict[int, None] = {}
    for range_ in sorted(ranges):
        number = bisect_right(starts, range_.start) - 1
        if number < 0 or range_.end > parts[number][0].end:
            return None
        found[number] = None

    def width(number: int) -> int:
        kind = stored.TYPES.get(parts[number][2]["dtype"])
        return kind.itemsize if kind else 1

    order = sorted(found, key=lambda number: (-width(number), number))
    return [(parts[number][0], {parts[number][1]: parts[number][2]}) for number in order]


def header_of(parts: list[tuple[Range, dict[str, Any]]]) -> bytes:
    """The header of a safetensors file with these tensors one after the other, padded so that they start on a page."""
    header: dict[str, Any] = {}
    end = 0
    for part, entry in parts:
        start, end = end, end + part.end - part.start
        header |= {name: {**content, "data_offsets": [start, end]} for name, content in entry.items()}
    return stored.header_bytes(header)


def copy_ranges(source: Path, target: Path, ranges: Iterable[Range], header: bytes) -> None:
    """Write a header and stretches of another file one after the other, without holding them in memory."""
    with source.open("rb") as old, target.open("wb", buffering=0) as new:
        new.write(header)
        for start, end in ranges:
            while start < end:
                start += copy_some(old.fileno(), new.fileno(), start, end - start)


def copy_some(old: int, new: int, start: int, count: int) -> int:
    """Append some bytes of one open file to another; how many."""
    if hasattr(os, "copy_file_range"):
        try:
            if done := os.copy_file_range(old, new, min(count, 1 << 30), offset_src=start):
                return done
        except OSError as cause:
            if cause.errno not in NO_KERNEL_COPY:
                raise
    piece = os.pread(old, min(count, PIECE), start)
    if not piece:
        raise ToolchainError("a file of weights became shorter while it was copied", help="let nobody write to it")
    return os.write(new, piece)


class LinkedTensor(ir.ExternalTensor):
    """External data in a file with a second name, which onnx_ir would not read; ``check_onnx`` looks where it lies."""

    def _check_path_containment(self) -> None:
        """Nothing: links are what we make ourselves, and what hubs make."""


def load_graph(path: Path) -> ir.Model:
    """Read a graph whose external data may lie in linked files."""
    model = ir.load(path)
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor: Any = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and has_other_name(path.parent / tensor.location):
                value.const_value = LinkedTensor(
                    tensor.location,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                    base_dir=path.parent,
                )
    return model


def has_other_name(path: Path) -> bool:
    """Whether a file is a link, or has a second name on the disk."""
    return path.is_symlink() or (path.exists() and path.stat().st_nlink > 1)


def check(path: Path) -> None:
    """Have ONNX's checker look at a file.

    It refuses external data that has a second name on the disk, so where files are linked it looks at a copy of the
    graph beside empty files of the same sizes.
    """
    locations = external_files(onnx.load(path, load_external_data=False))
    files = {path.parent / location: os.path.normpath(location) for location in locations}
    if not any(has_other_name(file) for file in files):
        onnx.checker.check_model(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        for file, location in files.items():
            stand_in = Path(folder) / location
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            with stand_in.open("wb") as empty:
                empty.truncate(file.stat().st_size)
        onnx.checker.check_model(copy)
