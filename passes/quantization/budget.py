"""Choose one option for each layer so that errors are least within a cost: a multiple-choice knapsack, exactly.

Layers are added one at a time, and of the sums so far those are kept that no other beats in both cost and error. What
remains in the end is the whole curve of best trades (Nemhauser and Ullmann 1969, doi:10.1287/mnsc.15.9.494). The costs
of a network's layers repeat, so that few sums remain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """What one layer may become: its cost (bytes, or any unit that adds up) and its squared error."""

    cost: int
    error: float


@dataclass(frozen=True)
class Trade:
    """A sum of options that no other beats.

    Args:
        cost: of all layers together.
        error: sum of squared errors.
        option: the last layer's choice.
        before: the sum of the layers before it.
    """

    cost: int
    error: float
    option: int = -1
    before: Trade | None = None

    def choices(self) -> list[int]:
        """The option of each layer, in order."""
        found: list[int] = []
        trade: Trade | None = self
        while trade is not None and trade.before is not None:
            found.append(trade.option)
            trade = trade.before
        return found[::-1]


def best_trades(layers: Iterable[Sequence[Option]]) -> list[Trade]:
    """All best trades of one option for each layer, from the cheapest to the most exact."""
    trades = [Trade(0, 0.0)]
    for options in layers:
        sums = [
            Trade(trade.cost + option.cost, trade.error + option.error, number, trade)
            for trade in trades
            for number, option in enumerate(options)
        ]
        trades = undominated(sums)
    return trades


def undominated(trades: list[Trade]) -> list[Trade]:
    """Those that no other beats in cost and error; of equal ones the first."""
    kept: list[Trade] = []
    for trade in sorted(trades, key=lambda t: (t.cost, t.error)):
        if not kept or trade.error < kept[-1].error:
            kept.append(trade)
    return kept


def within(trades: Sequence[Trade], cost: float) -> Trade | None:
    """The most exact trade of at most this cost."""
    fitting = [trade for trade in trades if trade.cost <= cost]
    return fitting[-1] if fitting else None


def at_most(trades: Sequence[Trade], error: float) -> Trade | None:
    """The cheapest trade of at most this sum of squared errors."""
    return next((trade for trade in trades if trade.error <= error), None)
