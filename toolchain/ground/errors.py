"""What can go wrong that a user can mend: one line each of what, where and what to do.

A leaf: it imports nothing of ours and no backend, so every room may use it.
"""

from __future__ import annotations

import difflib
import importlib
import re
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
        codes = {fault.exit_code for fault in faults}
        self.exit_code = codes.pop() if len(codes) == 1 else WRONG_USE


def raise_faults(faults: Sequence[ToolchainError]) -> None:
    """Raise the fault, or all of them together; do nothing when there is none."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise FaultsError(faults)


def unknown(kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> ToolchainError:
    """The error for a name that no catalogue holds, with the nearest one that it does."""
    names = sorted(known)
    tip = nearest(name, names) or (f"known: {', '.join(names)}" if names else "there is none at all")
    return ToolchainError(f"there is no {kind} named {name!r}", where=where, help=tip)


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'NAME'?`` for a name that was mistyped or cut short; empty when nothing is near."""
    names = sorted(known)
    low = name.lower()
    holding = [each for each in names if len(low) > 2 and (low in each.lower() or each.lower().endswith(f".{low}"))]
    near = difflib.get_close_matches(low, [each.lower() for each in names], n=1, cutoff=0.6)
    found = [next(each for each in names if each.lower() == near[0])] if near else holding[:3]
    return f"did you mean {' or '.join(map(repr, found))}?" if found else ""


def invalid(error: Any, *, what: str, where: str | None = None, model: Any = None) -> list[ToolchainError]:
    """One fault for each entry of a pydantic ``ValidationError``, in our words.

    Args:
        error: what pydantic raised.
        what: whose settings they are.
        where: the file that holds them.
        model: the class that was to be made, for the names that it knows.
    """
    faults = []
    for entry in error.errors():
        key = ".".join(str(part) for part in entry["loc"])
        path = ".".join(part for part in (where, key) if part) if where else key
        if entry["type"] == "extra_forbidden":
            known = fields_at(model, entry["loc"][:-1])
            tip = nearest(str(entry["loc"][-1]), known) or (f"known: {', '.join(known)}" if known else None)
            faults.append(ToolchainError(f"{what} has no setting {key!r}", where=path, help=tip))
        elif entry["type"] == "missing":
            faults.append(ToolchainError(f"{what} needs {key!r}", where=path))
        else:
            reason, tip = in_words(entry)
            faults.append(ToolchainError(f"{what}: {key} is {shown(entry['input'])}; {reason}", where=path, help=tip))
    return faults


def shown(value: Any) -> str:
    """A bad value as it was given, long ones cut."""
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]} …"


def fields_at(model: Any, places: Sequence[Any]) -> list[str]:
    """Settings that a pydantic class, or one nested in it at ``places``, knows."""
    for place in places:
        fields = getattr(model, "model_fields", {})
        model = fields[place].annotation if place in fields else None
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]


SORTS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list, such as ['first', 'second']",
    "list": "a list, such as ['first', 'second']",
    "set": "a list, such as ['first', 'second']",
    "dict": "a table",
    "model": "a table",
    "mapping": "a table",
}
"""What is wanted, by how pydantic's names of faults begin."""

BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "{} or less"),
    "less_than": ("lt", "less than {}"),
    "too_short": ("min_length", "{} or more entries"),
    "too_long": ("max_length", "{} or fewer entries"),
    "multiple_of": ("multiple_of", "a multiple of {}"),
}


def in_words(entry: Any) -> tuple[str, str | None]:
    """What pydantic wanted of a value, and what to do; in plain words."""
    kind, context = entry["type"], entry.get("ctx", {})
    if kind in BOUNDS and BOUNDS[kind][0] in context:
        key, text = BOUNDS[kind]
        return f"it must be {text.format(context[key])}", None
    if kind in ("literal_error", "enum"):
        expected = str(context.get("expected", ""))
        known = re.findall(r"'([^']*)'", expected)
        near = nearest(entry["input"], known) if isinstance(entry["input"], str) else ""
        return f"it is one of {', '.join(known) or expected}", near or None
    if kind == "finite_number":
        return "it must be a finite number", None
    sort = SORTS.get(kind.partition("_")[0])
    if sort and kind.partition("_")[2] in ("type", "parsing", "parsing_size", "from_float", "attributes_type"):
        tip = None
        if sort.startswith("a list") and isinstance(entry["input"], str):
            tip = f"write it in brackets: {entry['loc'][-1]}=[{', '.join(map(repr, entry['input'].split(',')))}]"
        return f"it must be {sort}", tip
    return str(entry["msg"]).removeprefix("Value error, ").replace("Input should be", "it must be"), None


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional backend when it is first used; never install one."""
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise UnavailableError(
            f"this needs {module!r}, which could not be imported: {cause}",
            help=f"pip install 'enginewright[{extra}]'",
        ) from cause
