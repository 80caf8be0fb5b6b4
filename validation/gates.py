"""Bounds that a user asks of the figures, such as ``fidelity.cosine >= 0.999``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from enginewright.ground.errors import ToolchainError, unknown
from enginewright.validation.contract import Metric

Verdict = Literal["met", "missed", "not_measured", "inconclusive"]

ORIGINAL = "fidelity_to_original"
"""What ``fidelity`` is of the untouched original; ``fidelity`` alone is held against what the steps intend."""

LATENCY_NAMES = ("latency.ratio", "latency.ratio_high")
"""The ratio of medians, judged by the whole of its interval; and the upper end of that interval as a number."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_SYNTAX = re.compile(
    rf"\s*(?:(?P<target>[\w.-]+)\s*:)?\s*(?P<name>[\w.]+)\s*(?P<operator>>=|<=|>|<)\s*(?P<bound>{_NUMBER})\s*"
)


@dataclass(frozen=True, kw_only=True)
class GateBound:
    """A bound on one figure.

    Args:
        name: the figure, such as ``latency.ratio``.
        target: the only target it is asked of; ``None`` asks it of every target. Of a pipeline, ``PART.TARGET`` or
            ``TARGET`` for that of every part.
        operator: ``>=``, ``<=``, ``>`` or ``<``.
        bound: what the figure is held against.
    """

    name: str
    target: str | None
    operator: str
    bound: float

    @property
    def part(self) -> str:
        """The part of a pipeline that it is asked of; empty where it names none."""
        return (self.target or "").rpartition(".")[0]

    @property
    def engine(self) -> str | None:
        """The target without the part."""
        return self.target and self.target.rpartition(".")[2]

    def of_part(self, name: str) -> GateBound | None:
        """What it asks of one part of a pipeline; None where it is another's."""
        return replace(self, target=self.engine) if self.part in ("", name) else None

    def __str__(self) -> str:
        """The text it was parsed from, evenly spaced."""
        scope = f"{self.target}: " if self.target else ""
        return f"{scope}{self.name} {self.operator} {self.bound!r}"


def gate_names(metrics: Mapping[str, Metric]) -> list[str]:
    """Every figure that a gate may name."""
    to_original = (f"{ORIGINAL}.{name}" for name, metric in metrics.items() if metric.kind == "fidelity")
    return [*(f"{metric.kind}.{name}" for name, metric in metrics.items()), *to_original, *LATENCY_NAMES]


def parse(text: str, *, known: Iterable[str], where: str | None = None) -> GateBound:
    """Read ``[target:] name operator number``.

    Args:
        text: what the user wrote.
        known: names of the figures, see ``gate_names``.
        where: the place of the text in a recipe, for the error.

    Raises:
        ToolchainError: not of that form, a name that no figure has, or a bound without end.
    """
    found = _SYNTAX.fullmatch(text)
    if found is None:
        raise ToolchainError(
            f"{text!r} is not a gate",
            where=where,
            help="write 'fidelity.cosine >= 0.999', or for one target 'onnxruntime: latency.ratio <= 0.8'",
        )
    known = list(known)
    if found["name"] not in known:
        raise unknown("figure", found["name"], known, where=where)
    bound = float(found["bound"])
    if not math.isfinite(bound):
        raise ToolchainError(
            f"{found['bound']} in {text!r} is too large for a number, so the gate would bound nothing", where=where
        )
    return GateBound(name=found["name"], target=found["target"], operator=found["operator"], bound=bound)


def judge(
    bound: GateBound,
    value: float | None,
    reason: str = "",
    *,
    interval: tuple[float, float] | None = None,
    unsafe: str = "",
) -> tuple[Verdict, str]:
    """Hold a figure against its bound.

    Args:
        bound: what was asked.
        value: the figure; ``None`` when it was not measured.
        reason: why it was not measured.
        interval: where the true figure lies; all of it must meet the bound, or all of it miss it.
        unsafe: why nothing may rest on the figure; empty when it may.

    Returns:
        The verdict, and why unless it is ``met``. NaN is missed, whatever the bound.
    """
    if value is None:
        return "not_measured", reason or f"{bound.name} was not measured"
    low, high = interval or (value, value)
    if any(map(math.isnan, (value, low, high))):
        return "missed", f"{bound.name} is not a number"
    if unsafe:
        return "inconclusive", unsafe
    holds = _OPERATORS[bound.operator]
    if holds(low, bound.bound) and holds(high, bound.bound):
        return "met", ""
    if holds(low, bound.bound) or holds(high, bound.bound):
        return "inconclusive", (
            f"{bound.name} is {value:.10g}, but its interval, {low:.6g} to {high:.6g}, holds the bound {bound.bound!r}"
        )
    return "missed", f"{bound.name} is {value:.10g}, asked for {bound.operator} {bound.bound!r}"
