"""Building a module without memory for its weights, and giving it weights that stay on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import read_json
from enginewright.targets import stored

LONGEST_NAME = 255
"""Bytes of a file's name."""

SHOWN = 8
"""Tensors that an error names."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules built in this block have parameters of shape and type alone, on the meta device.

    Buffers stay real: many are computed when the module is built, and no file holds them.
    """
    register = nn.Module.register_parameter

    def lighter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = lighter  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    where: Path,
    spare: Collection[str] = (),
) -> None:
    """Give each parameter and persistent buffer its tensor, in place of the one it was built with.

    Args:
        module: built ``without_memory``, or not.
        tensors: by name, as ``stored.read`` gives them.
        where: the file or folder they are from, for errors.
        spare: names that the tensors may hold though the module does not.

    Raises:
        ToolchainError: tensors are missing, left over or of another shape; all are counted, some listed.
    """
    wanted: dict[str, Tensor] = module.state_dict()
    tied = tied_names(module)
    lacking = {name for name in wanted.keys() - tensors.keys() if not tied.get(name, set()) & tensors.keys()}
    faults = [f"missing {name}" for name in lacking]
    faults += [f"unknown {name}" for name in tensors.keys() - wanted.keys() - set(spare)]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    if faults:
        listed = "; ".join(sorted(faults)[:SHOWN]) + ("; …" if len(faults) > SHOWN else "")
        raise ToolchainError(
            f"{where.name} does not fit the model ({len(faults)} tensors): {listed}",
            where=str(where),
            help="check that configuration and weights belong together",
        )
    module.load_state_dict({name: tensors[name] for name in wanted.keys() & tensors.keys()}, strict=False, assign=True)
    for name, others in tied.items():
        if name not in tensors:
            tie(module, name, next(other for other in sorted(others) if other in tensors))


def tied_names(module: nn.Module) -> dict[str, set[str]]:
    """For each name of a tensor that has several, the other names."""
    by_tensor: dict[int, set[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), set()).add(name)
    return {name: names - {name} for names in by_tensor.values() if len(names) > 1 for name in names}


def tie(module: nn.Module, name: str, other: str) -> None:
    """Make ``name`` the same parameter as ``other``."""
    holder, _, leaf = name.rpartition(".")
    source, _, source_leaf = other.rpartition(".")
    setattr(module.get_submodule(holder), leaf, getattr(module.get_submodule(source), source_leaf))


def shards(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index lists.

    Raises:
        ToolchainError: none is there; a shard is missing or lies outside the folder.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        other = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
        raise ToolchainError(
            f"there are no safetensors weights ({single.name}) in {folder.name!r}",
            where=str(folder),
            help="weights in .bin files are pickles and are never read; save them again with safe_serialization=True"
            if other
            else "is the download complete?",
        )
    try:
        listed: dict[str, Any] = read_json(index, what=index.name)["weight_map"]
        names = sorted({str(name) for name in listed.values()})
    except (ToolchainError, KeyError, TypeError, AttributeError) as cause:
        raise ToolchainError(f"{index.name} cannot be read as an index of shards", where=str(index)) from cause
    if odd := [name for name in names if not name.isprintable() or len(name.encode()) > LONGEST_NAME]:
        raise ToolchainError(f"{index.name} names a file that cannot be: {odd[0][:80]!r}", where=str(index))
    if outside := [name for name in names if Path(name).name != name]:
        raise ToolchainError(f"{index.name} points outside its folder: {outside[0]!r}; refused", where=str(index))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ToolchainError(
            f"{len(absent)} of {len(names)} shards are missing: {', '.join(absent[:SHOWN])}",
            where=str(folder),
            help="complete the download",
        )
    return [folder / name for name in names]


def read_all(paths: list[Path]) -> dict[str, Tensor]:
    """Map several files as one."""
    return {name: tensor for path in paths for name, tensor in stored.read(path).items()}


def on_meta(module: nn.Module) -> list[str]:
    """Names of tensors that were given no values."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in named if tensor.device == torch.device("meta")]
