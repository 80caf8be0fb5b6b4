"""Weights that stay on disk: safetensors files mapped read-only, and where in them a tensor lies.

A mapped tensor costs no memory until it is read, and its pages can be dropped again. Because a tensor's address tells
its file and offset, an export can point at the bytes that are there instead of writing them again: whatever a library
did on the way (renamed, tied, assigned), the tensor is either these very bytes or it is not.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import parse_json

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PAGE = 4096
"""Bytes."""

LARGEST_SIZE = 2**40
"""Of one dimension."""

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    path: Path
    offset: int
    bytes: int


_mapped: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
_paths: dict[int, Path] = {}


def read(path: Path, *, lasting: bool = True) -> dict[str, Tensor]:
    """Map a safetensors file; its tensors are read-only and cost no memory until read.

    Args:
        path: the file.
        lasting: it will stay, so that graphs may point into it; ``place_of`` does not tell of others.

    Raises:
        ToolchainError: not there, cut short, or not a safetensors file.
    """
    header, start = read_header(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        base = torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr()
        for name, entry in header.items():
            tensors[name] = one_tensor(mapped, name, entry, start, size, path)
    if lasting:
        _mapped[base], _paths[base] = mapped, path.absolute()
    return tensors


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """What a safetensors file with these entries begins with, padded so that its tensors start on a page."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors that a safetensors file says it holds, and where their bytes start."""
    damaged = ToolchainError(
        f"{path.name} is not a whole safetensors file",
        where=str(path),
        help="it may have been cut short; copy or download it again",
    )
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= LARGEST_HEADER:
                raise damaged
            if length > os.fstat(file.fileno()).st_size - 8:  # before so much memory is taken
                raise damaged
            header = parse_json(file.read(length), what="the header")
    except FileNotFoundError as cause:
        raise ToolchainError(f"there is no weights file {path.name!r}", where=str(path)) from cause
    except OSError as cause:
        raise ToolchainError(f"{path.name} cannot be read: {cause.strerror}", where=str(path)) from cause
    except ToolchainError as cause:
        raise damaged from cause
    if not isinstance(header, dict):
        raise damaged
    header.pop("__metadata__", None)
    return header, 8 + length


def one_tensor(mapped: mmap.mmap, name: str, entry: Any, start: int, size: int, path: Path) -> Tensor:
    """One tensor of a mapped file, after checking that it lies inside and is as long as its shape says."""
    try:
        dtype, shape = TYPES[entry["dtype"]], [whole(n) for n in entry["shape"]]
        first, last = (start + whole(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as cause:
        raise ToolchainError(f"{path.name}: the entry of {name!r} cannot be read", where=str(path)) from cause
    count = 1
    for n in shape:
        count *= n
    if min(shape, default=0) < 0 or not start <= first <= last or last - first != count * dtype.itemsize:
        raise ToolchainError(f"{path.name}: the entry of {name!r} contradicts itself", where=str(path))
    if last > size:
        raise ToolchainError(
            f"{path.name} is cut short: {name!r} ends at byte {last}, the file at {size}",
            where=str(path),
            help="copy or download it again",
        )
    if not count:
        if max(shape) > LARGEST_SIZE:
            raise ToolchainError(f"{path.name}: the entry of {name!r} contradicts itself", where=str(path))
        return torch.empty(shape, dtype=dtype)
    if first % dtype.itemsize:
        return torch.frombuffer(bytearray(mapped[first:last]), dtype=dtype).view(shape)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=first).view(shape)


def whole(value: Any) -> int:
    """A whole number of a header, which no text, truth or fraction may stand for."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def place_of(tensor: Tensor) -> Place | None:
    """Where a tensor's bytes lie on disk; None when it is in memory, or is not laid out as its shape says."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu" or tensor.numel() == 0:
        return None
    address, length = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    for base, mapped in list(_mapped.items()):
        if base <= address and address + length <= base + len(mapped):
            return Place(_paths[base], address - base, length)
    return None
