"""Which sizes of their dynamic dimensions engines are run at, beside the typical ones, and what is made of the outcome.

Smallest, odd and largest sizes, in combinations where there are several dimensions: what holds for the example's size
alone shows at one of them. A call that would take too long or too much memory is left out, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from enginewright.ground.distance import relative_l2
from enginewright.ground.signature import Array, Arrays, Dim, InputSpec

Sizes = dict[str, int]

MOST = 8
"""Combinations of sizes that are run at most."""

SECONDS, BYTES = 20.0, 2e9
"""What one call may take, estimated from a call of typical sizes."""

WITHIN = 4.0
"""Memory inside a network, in the sizes of its inputs and outputs."""

FAR, FURTHER = 1e-3, 20.0
"""An error at a size is a fault above the first and that many times the error at typical sizes."""


@dataclass(frozen=True, kw_only=True)
class SizeOutcome:
    """What a runner did at some sizes.

    Args:
        sizes: of every dynamic dimension.
        verdict: ``missed`` where it failed or strayed.
        relative_l2: the largest over the outputs that are floats; None where it was not measured.
        reason: why it was missed or not measured.
    """

    sizes: Mapping[str, int]
    verdict: Literal["met", "missed", "not_measured"]
    relative_l2: float | None = None
    reason: str = ""


def dims_of(specs: Sequence[InputSpec]) -> dict[str, Dim]:
    """The dimensions that may change, by name."""
    found = {d.name: d for spec in specs for d in spec.shape if isinstance(d, Dim)}
    return {name: d for name, d in found.items() if smallest(d) < largest(d)}


def smallest(d: Dim) -> int:
    """The smallest size that a dimension takes."""
    return -(-d.low // d.multiple_of) * d.multiple_of


def largest(d: Dim) -> int:
    """The largest size that a dimension takes."""
    return d.high // d.multiple_of * d.multiple_of


def odd(d: Dim) -> int | None:
    """A size between the ends near the typical one, an odd multiple if there is one; None where there is no other."""
    step = d.multiple_of
    between = [n for n in range(smallest(d) + step, min(largest(d), 4 * d.typical + 8 * step), step) if n != d.typical]
    return min(between, key=lambda n: ((n // step) % 2 == 0, abs(n - d.typical), -n), default=None)


def at_limits(specs: Sequence[InputSpec]) -> list[Sizes]:
    """Smallest, typical and largest sizes of all dimensions together."""
    dims = {d.name: d for spec in specs for d in spec.shape if isinstance(d, Dim)}
    which: tuple[Callable[[Dim], int], ...] = (smallest, lambda d: d.typical, largest)
    return [{name: size(d) for name, d in dims.items()} for size in which]


def combinations(specs: Sequence[InputSpec]) -> list[Sizes]:
    """At most ``MOST`` combinations of sizes to run at, the cheapest first; none where no dimension may change.

    All smallest, all odd, each largest beside smallest and each smallest beside typical ones, all largest: every pair
    of dimensions meets at both ends.
    """
    dims = dims_of(specs)
    typical = {name: d.typical for name, d in dims.items()}
    low = {name: smallest(d) for name, d in dims.items()}
    high = {name: largest(d) for name, d in dims.items()}
    between = {name: odd(d) or d.typical for name, d in dims.items()}
    wanted = [low, between, *({**low, name: high[name]} for name in dims), high]
    wanted += [{**typical, name: low[name]} for name in dims]
    unique = [sizes for i, sizes in enumerate(wanted) if sizes != typical and sizes not in wanted[:i]]
    return sorted(unique[:MOST], key=lambda sizes: growth(specs, sizes))


def growth(specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> float:
    """How many times the work of typical sizes these sizes ask for, as a guess from above.

    In proportion to every dimension, and once more to the largest that is no batch, for attention.
    """
    dims = dims_of(specs)
    ratios = {name: sizes[name] / d.typical for name, d in dims.items()}
    rows = {spec.shape[0].name for spec in specs if spec.shape and isinstance(spec.shape[0], Dim)}
    return math.prod(ratios.values()) * max([1.0, *(ratio for name, ratio in ratios.items() if name not in rows)])


def too_large(specs: Sequence[InputSpec], sizes: Mapping[str, int], *, seconds: float, size: int) -> str:
    """Why a call at these sizes is left out; empty where it is not.

    Args:
        specs: the inputs.
        sizes: of the dimensions.
        seconds: what a call at typical sizes takes.
        size: bytes of its inputs and outputs.
    """
    times = growth(specs, sizes)
    if times * seconds > SECONDS:
        return f"would take about {times * seconds:.0f} s"
    if times > 1 and times * size * WITHIN > BYTES:
        return f"would take about {times * size * WITHIN / 1e9:.0f} GB"
    return ""


def text_of(sizes: Mapping[str, int]) -> str:
    """Sizes in words, such as ``batch = 1, time = 11``."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items()) or "fixed sizes"


def with_ends(arrays: Arrays, specs: Sequence[InputSpec]) -> Arrays:
    """The same call with both ends of each integer input's range in it."""
    found = dict(arrays)
    for spec in specs:
        array = found[spec.name]
        if spec.default is None and spec.low is not None and spec.high is not None and array.dtype.kind in "iu":
            changed = array.copy().reshape(-1)
            changed[-1:], changed[:1] = int(spec.high) - 1, int(spec.low)
            found[spec.name] = changed.reshape(array.shape)
    return found


def hiding_a_row(arrays: Arrays, specs: Sequence[InputSpec]) -> Arrays | None:
    """The same call with nothing but False in the last row of each boolean input; None where no input has such rows."""
    found = dict(arrays)
    for spec in specs:
        array = found[spec.name]
        if array.dtype.kind == "b" and array.ndim > 1 and spec.low is None and array.shape[-1] > 1:
            changed = array.copy()
            changed.reshape(-1, array.shape[-1])[-1] = False
            found[spec.name] = changed
    return found if any(found[name] is not arrays[name] for name in arrays) else None


def furthest(original: Arrays, candidate: Arrays) -> float:
    """The largest relative L2 error over the outputs that are floats."""
    pairs = [(array, candidate[name]) for name, array in original.items() if array.dtype.kind == "f"]
    return max((relative_l2(*pair) for pair in pairs), default=0.0)


def unlike(original: Arrays, candidate: Arrays) -> str:
    """What is wrong with a candidate's outputs whatever their values are; empty when nothing is."""
    for name, wanted in original.items():
        if name not in candidate:
            return f"output {name!r} is missing"
        got = candidate[name]
        if got.shape != wanted.shape:
            return f"output {name!r} has shape {got.shape}; the original's is {wanted.shape}"
        if finite(wanted) and not finite(got):
            return f"output {name!r} is not finite; the original's is"
    return ""


def finite(array: Array) -> bool:
    """Whether an array holds no NaN and no infinity."""
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def strays(error: float, typical: float) -> bool:
    """Whether an error at some sizes is far above the error at typical ones."""
    return error > FAR and error > FURTHER * typical


def outcome(sizes: Mapping[str, int], original: Arrays, candidate: Arrays, typical: float) -> SizeOutcome:
    """Hold a candidate's outputs at some sizes against the original's.

    Args:
        sizes: of the dimensions.
        original: its outputs.
        candidate: outputs for the same inputs.
        typical: the candidate's relative error at typical sizes.
    """
    if fault := unlike(original, candidate):
        return SizeOutcome(sizes=sizes, verdict="missed", reason=fault)
    error = furthest(original, candidate)
    if strays(error, typical):
        reason = f"relative error {error:.2g}, at typical sizes {typical:.2g}"
        return SizeOutcome(sizes=sizes, verdict="missed", relative_l2=error, reason=reason)
    return SizeOutcome(sizes=sizes, verdict="met", relative_l2=error)


def guilty(sizes: Mapping[str, int], typical: Mapping[str, int], fails: Callable[[Sizes], bool]) -> Sizes:
    """The sizes that are to blame for a failure: those that fail alone beside typical ones, or else all of them.

    Args:
        sizes: where it failed.
        typical: where it did not.
        fails: sizes -> whether it fails there.
    """
    changed = {name: size for name, size in sizes.items() if size != typical[name]}
    alone = {name: size for name, size in changed.items() if fails({**typical, name: size})}
    return alone or dict(sizes)
