"""What can go wrong that a user can mend: one line each of what, where and what to do.

A leaf: it imports nothing of ours and no backend, so every room may use it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

DONE, MISSED, WRONG_USE, CANNOT, INTERNAL = 0, 1, 2, 3, 70


class ToolchainError(Exception):
    """A fault that the user can mend, shown without a traceback.

    Args:
        message: what is wrong; quotes the bad value.
        where: file, key or layer at fault.
        help: what to do about it.
    """

    exit_code = WRONG_USE

    def __init__(self, message: str, *, where: str | None = None, help: str | None = None) -> None:
        super().__init__(message)
        self.message, self.where, self.help = message, where, help

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  --> {self.where}")
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


class InternalError(Exception):
    """A fault of ours, found while we worked: no user can mend it. The cause keeps its traceback.

    Args:
        message: what went wrong, in one line.
        where: the step at fault, and the steps before it.
    """

    exit_code = INTERNAL

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message)
        self.message, self.where = message, where
        self.help = "this is a bug of ours, not a fault of yours; please report it with the traceback"

    def __str__(self) -> str:
        lines = [self.message, *([f"  --> {self.where}"] if self.where else []), f"  help: {self.help}"]
        return "\n".join(lines)


class UnavailableError(ToolchainError):
    """This machine cannot do what was asked."""

    exit_code = CANNOT


class FaultsError(ToolchainError):
    """Several faults, found in one go."""

    def __init__(self, faults: Sequence[ToolchainError]) -> None:
        super().__init__("\nerror: ".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


def raise_faults(faults: Sequence[ToolchainError]) -> None:
    """Raise the fault, or all of them together; do nothing when there is none."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise FaultsError(faults)


def unknown(kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> ToolchainError:
    """The error for a name that no catalogue holds, with the nearest one that it does."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    tip = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return ToolchainError(f"there is no {kind} named {name!r}", where=where, help=tip)


def invalid(error: Any, *, what: str, where: str | None = None) -> list[ToolchainError]:
    """One fault for each entry of a pydantic ``ValidationError``, in our words."""
    faults = []
    for entry in error.errors():
        key = ".".join(str(part) for part in entry["loc"])
        path = ".".join(part for part in (where, key) if part) if where else key
        if entry["type"] == "extra_forbidden":
            faults.append(ToolchainError(f"{what} has no setting {key!r}", where=path))
        elif entry["type"] == "missing":
            faults.append(ToolchainError(f"{what} needs {key!r}", where=path))
        else:
            reason = entry["msg"].removeprefix("Value error, ")
            faults.append(ToolchainError(f"{what}: {key} is {entry['input']!r}; {reason}", where=path))
    return faults


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional backend when it is first used; never install one."""
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise UnavailableError(
            f"this needs {module!r}, which could not be imported: {cause}",
            help=f"pip install 'enginewright[{extra}]'",
        ) from cause
