"""Dimensions that may change from call to call, on their way through the exporter: declared, bound, and read back.

An entry is (name, smallest, largest) or (name, smallest, largest, multiple). The exporter keeps no promise about them:
it narrows a range at a branch on a size, fixes a dimension, or finds that only multiples work, and says nothing. So
what it found is held against what was declared.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError, raise_faults
from enginewright.targets.pytorch_engine import flat

Entry = tuple[str, int, int] | tuple[str, int, int, int]
Axes = Mapping[str, Mapping[int, Entry]]
"""For each input, its dynamic axes."""

SYMBOLS = "torch.fx.experimental.symbolic_shapes"
"""The logger on which torch says what it concluded about a size, and from which line."""


def multiple_of(entry: Entry) -> int:
    """What every size of a dimension is a multiple of."""
    return entry[3] if len(entry) > 3 else 1


def declared(axes: Axes, inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """What ``torch.export`` is told: one ``Dim`` for each name; a range of one size is no range."""
    entries = {entry[0]: entry for by in axes.values() for entry in by.values()}
    dims = {
        name: torch.export.Dim(name, min=low, max=high) for name, (_, low, high, *_) in entries.items() if low < high
    }
    return {
        name: {axis: dims[entry[0]] for axis, entry in axes.get(name, {}).items() if entry[0] in dims}
        for name in inputs
    }


@contextlib.contextmanager
def called_plainly(module: nn.Module, axes: Axes, names: Sequence[str]) -> Iterator[None]:
    """Let the tracer meet a module that takes named tensors, and returns a tensor or a flat tuple of its tensors.

    It is told before it starts that equal names are equal sizes, and what sizes are multiples of: ``torch.export``
    itself compares dimensions of one name at the end only, too late for a ``view`` that mixes inputs. And it has no way
    to open a dimension of an input that ``forward`` takes by ``**kwargs``.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    multiples: dict[str, int] = {}
    for name, by in axes.items():
        for axis, entry in by.items():
            places.setdefault(entry[0], []).append((name, axis))
            multiples[entry[0]] = multiple_of(entry)

    def check(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        del module, args
        for dim, found in places.items():
            sizes = [kwargs[name].shape[axis] for name, axis in found if name in kwargs]
            for size in sizes[1:]:
                torch._check(sizes[0] == size)
            if sizes and multiples[dim] > 1:
                torch._check(sizes[0] % multiples[dim] == 0)

    def spread(module: nn.Module, args: Any, answer: Any) -> Any:
        del module, args
        return answer if isinstance(answer, Tensor) else tuple(flat(answer))

    hooks = (module.register_forward_pre_hook(check, with_kwargs=True), module.register_forward_hook(spread))
    try:
        with signed(module, names):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def signed(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give a ``forward(**kwargs)`` a signature with the names of its inputs, for a while."""
    forward = module.forward
    if set(names) <= inspect.signature(forward).parameters.keys():
        yield
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(**dict(zip(names, args, strict=False)), **kwargs)

    own = "forward" in vars(module)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    module.forward = named
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def refuse_narrowed(program: Any, axes: Axes, conclusions: Callable[[], list[str]]) -> None:
    """Refuse a program that holds for fewer sizes than were declared.

    Args:
        program: a ``torch.export.ExportedProgram``, called with the inputs of ``axes`` by name.
        axes: what was declared.
        conclusions: gives what torch concluded while tracing, see ``conclusions_heard``; asked on a fault alone.

    Raises:
        ToolchainError: names each dimension, what is left of it, the line where torch tells it, and how to declare it.
    """
    metas = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    faults: dict[str, tuple[str, int, Entry, Entry | str]] = {}
    for user in program.graph_signature.user_inputs:
        for axis, entry in axes.get(str(user), {}).items():
            value = metas.get(user)
            if isinstance(value, Tensor) and entry[1] < entry[2] and entry[0] not in faults:
                found = narrowed(value.shape[axis], entry, program.range_constraints)
                if found is not None:
                    faults[entry[0]] = (str(user), axis, entry, found)
    if faults:
        said = conclusions()
        raise_faults([narrower_than_declared(*fault, reason(fault[2][0], axes, said)) for fault in faults.values()])


def narrowed(size: Any, entry: Entry, ranges: Mapping[Any, Any]) -> Entry | str | None:
    """What is left of a dimension: an entry as it should be declared, a formula that binds it, or None for all."""
    name, low, high, *_ = entry
    if isinstance(size, int):
        return (name, size, size)
    expression, factor = size.node.expr, 1
    if not expression.is_Symbol:
        symbol, *others = sorted(expression.free_symbols, key=str)
        ratio = expression / symbol
        if others or not ratio.is_Integer:
            return str(expression)
        factor = int(ratio)
    found, asked = ranges.get(expression), multiple_of(entry)
    least = int(found.lower) if found is not None and found.lower.is_Integer else low
    most = int(found.upper) if found is not None and found.upper.is_Integer else high
    if least == 2:  # torch takes sizes of 0 and 1 for special; what a size of 1 does is found by running
        least = low
    step = math.lcm(asked, factor)
    smallest, largest = (-(-max(low, least) // step) * step, min(high, most) // step * step)
    if step == asked and smallest <= -(-low // asked) * asked and largest >= high // asked * asked:
        return None
    return (name, smallest, largest) if step == 1 else (name, smallest, largest, step)


def narrower_than_declared(user: str, axis: int, entry: Entry, found: Entry | str, where: str | None) -> ToolchainError:
    """The error for a dimension that holds for fewer sizes than it was declared with."""
    name, low, high, *_ = entry
    if isinstance(found, str):
        return ToolchainError(
            f"dimension {name!r} of {user!r} cannot be chosen freely: the model binds it to {found}",
            where=where,
            help="give sizes that belong together one name, or make this one fixed in the model's inputs",
        )
    if found[1] == found[2]:
        return ToolchainError(
            f"the exporter fixed dimension {name!r} of {user!r} at {found[1]}",
            where=where,
            help="something in the model holds for that size alone; make the dimension fixed in its inputs",
        )
    what = f"multiples of {multiple_of(found)} from " if multiple_of(found) > 1 else ""
    advice = f"declare {name} from {found[1]} to {found[2]}, as {{{axis}: {found!r}}}"
    return ToolchainError(
        f"dimension {name!r} of {user!r} is declared from {low} to {high}; what was traced holds for "
        f"{what}{found[1]} to {found[2]} only",
        where=where,
        help=f"{advice}; or let the model compute in the same way at every size, as with torch.where",
    )


def reason(dim: str, axes: Axes, said: list[str]) -> str | None:
    """The first conclusion about a dimension, such as ``x.shape[1] > 8 at net.py:12 in forward``."""
    places = {f"{name}.shape[{axis}]" for name, by in axes.items() for axis, entry in by.items() if entry[0] == dim}
    return next((text for text in said if any(place in text for place in places)), None)


@contextlib.contextmanager
def conclusions_heard() -> Iterator[list[str]]:
    """Collect what torch concludes about sizes while it traces, with dimensions under their inputs' names.

    The list holds sentences such as ``x.shape[1] > 8 at net.py:12 in forward``.
    """
    heard: list[str] = []
    symbols: dict[str, str] = {}

    class Ear(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            text = entry.getMessage()
            if made := re.match(r"create_symbol (\w+) = \S+ for L\['(\w+)'\]\.size\(\)\[(\d+)\]", text):
                symbols[made[1]] = f"{made[2]}.shape[{made[3]}]"
            elif drawn := re.match(r"eval (.+?) \[guard added\] \((.+?):(\d+) in (.+?)\)", text):
                file = PurePath(drawn[2]).name
                if not drawn[2].startswith(("_", "<")):
                    formula = re.sub(r"\bs\d+\b", lambda found: symbols.get(found[0], found[0]), drawn[1])
                    heard.append(f"{formula} at {file}:{drawn[3]} in {drawn[4]}")

    log, ear = logging.getLogger(SYMBOLS), Ear()
    level, propagates, others = log.level, log.propagate, log.handlers[:]
    log.handlers[:], log.propagate = [ear], False
    log.setLevel(logging.INFO)
    try:
        yield heard
    finally:
        log.handlers[:], log.propagate = others, propagates
        log.setLevel(level)
