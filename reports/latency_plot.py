"""Where the marks of the latency plot stand: every sample of every engine, the original's own beside them.

Across, places are percentages of the plot's width, so that text keeps its size on a narrow page; down, pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from enginewright.reports import words
from enginewright.reports.record import TargetRecord

LABEL, BAND, GAP, GROUP_GAP, AXIS = 20, 36, 14, 20, 40
"""Pixels: a row's label, its band of dots, the gap below, the gap between targets, and the axis."""

ZOOM = 0.6
"""The axis starts at 0 unless the fastest sample takes more than this part of the slowest one's time."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on the axis."""

    x: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One sample."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """The samples of one runner; ``top`` and ``bottom`` bound its band of dots."""

    label: str
    kind: Literal["engine", "original"]
    top: float
    bottom: float
    dots: list[Dot]
    median_x: float
    median: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Everything that the template draws."""

    rows: list[Row]
    ticks: list[Tick]
    height: float
    floor: float
    starts_at_zero: bool


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear scale in milliseconds, from one tick to another."""

    low: float
    high: float
    step: float

    def place(self, value_ms: float) -> float:
        """Percent of the width."""
        return 100 * (value_ms - self.low) / (self.high - self.low)

    def ticks(self) -> list[Tick]:
        """All ticks, both ends included."""
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        values = [self.low + self.step * number for number in range(round((self.high - self.low) / self.step) + 1)]
        return [Tick(x=self.place(value), label=f"{value:.{decimals}f}") for value in values]


def axis_for(values_ms: Sequence[float], *, about: int = 5) -> Axis:
    """An axis around all values, with about so many steps of 1, 2 or 5 times a power of ten."""
    least, most = min(values_ms), max(values_ms)
    if most <= 0:
        return Axis(low=0, high=1, step=1)
    low = least if least > ZOOM * most and least < most else 0.0
    step = _nice((most - low) / about)
    return Axis(low=math.floor(low / step) * step, high=math.ceil(most / step) * step, step=step)


def _nice(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def plot(targets: Sequence[TargetRecord]) -> Plot | None:
    """The plot of all targets that were timed; none when none was."""
    timed = [(target.name, target.latency) for target in targets if target.latency]
    samples = [seconds * 1e3 for _, each in timed for seconds in (*each.samples_s, *each.original_samples_s)]
    if not samples:
        return None
    axis = axis_for(samples)
    rows: list[Row] = []
    top = 0.0
    for name, each in timed:
        rows.append(_row(name, "engine", each.samples_s, each.median_s, axis, top))
        top = rows[-1].bottom + GAP
        rows.append(
            _row(f"original beside {name}", "original", each.original_samples_s, each.original_median_s, axis, top)
        )
        top = rows[-1].bottom + GAP + GROUP_GAP
    floor = rows[-1].bottom + GAP
    return Plot(rows=rows, ticks=axis.ticks(), height=floor + AXIS, floor=floor, starts_at_zero=axis.low == 0)


def _row(
    label: str, kind: Literal["engine", "original"], samples_s: Sequence[float], median_s: float, axis: Axis, top: float
) -> Row:
    """Dots stand one below the other in the order of their calls: a drift shows as a slant."""
    band = top + LABEL
    dots = [
        Dot(
            x=axis.place(seconds * 1e3),
            y=band + BAND * (number + 0.5) / len(samples_s),
            title=f"{label}, call {number + 1}: {words.milliseconds(seconds)}",
        )
        for number, seconds in enumerate(samples_s)
    ]
    return Row(
        label=label,
        kind=kind,
        top=band,
        bottom=band + BAND,
        dots=dots,
        median_x=axis.place(median_s * 1e3),
        median=f"median {words.milliseconds(median_s)}",
    )
