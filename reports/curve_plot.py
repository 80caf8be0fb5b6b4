"""Where the marks of a trade-off curve stand. Across, percent of the plot's width; down, pixels."""

from __future__ import annotations

from dataclasses import dataclass

from enginewright.reports.latency_plot import Tick, axis_for
from enginewright.reports.record import Curve

HEIGHT = 180
"""Pixels from the top of the plot to its floor."""

MARGIN = 8
"""Percent of the width on the left, for the labels of the y axis."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of the curve."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Everything that the template draws; ``across`` are ticks of x, ``down`` of y (their ``x`` is in pixels)."""

    marks: list[Mark]
    chosen: Mark
    across: list[Tick]
    down: list[Tick]
    floor: float


def plot(curve: Curve) -> Plot:
    """The plot of a step's curve."""
    wide = axis_for([0.0, *(x for x, _ in curve.points), curve.chosen[0]])
    high = axis_for([0.0, *(y for _, y in curve.points), curve.chosen[1]])

    def across(place: float) -> float:
        return MARGIN + place * (100 - MARGIN) / 100

    def down(place: float) -> float:
        return 10 + (HEIGHT - 10) * (1 - place / 100)

    def mark(x: float, y: float) -> Mark:
        return Mark(x=across(wide.place(x)), y=down(high.place(y)), title=f"{curve.x}: {x:.3g}; {curve.y}: {y:.3g}")

    return Plot(
        marks=[mark(x, y) for x, y in curve.points],
        chosen=mark(*curve.chosen),
        across=[Tick(x=across(tick.x), label=tick.label) for tick in wide.ticks()],
        down=[Tick(x=down(tick.x), label=tick.label) for tick in high.ticks()],
        floor=HEIGHT,
    )
