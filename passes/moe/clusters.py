"""Hidden units that answer the same tokens, put together: experts of which a token needs few.

Source: Zhang et al. 2022, arXiv:2110.01786 (MoEfication), section 3.2, which clusters the units of a feed-forward into
experts of one size. Departures: there balanced k-means is of the units' weights, or a graph of units that are above
zero together is cut; here balanced k-means is of how large each unit's answer is on calibration tokens, because a
GELU's units are hardly ever zero. It starts from units far from one another, so that nothing is drawn.

Shapes: R rows, U units, H hidden units of a layer, E clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from enginewright.passes.contract import Context
from enginewright.passes.moe.watching import watch
from enginewright.passes.traits import FeedForward

ROWS = 2048
"""Calibration rows that units are compared on, of all calls together."""

ROUNDS = 20
"""Most rounds of k-means: it is a start, and training follows."""

DIGITS = 1e6
"""Likenesses are rounded to so many parts, so that the last bits of another machine decide nothing."""


def answer_sizes(model: nn.Module, layers: Mapping[str, FeedForward], context: Context) -> dict[str, Tensor]:
    """How large the answer of each hidden unit is on rows of calibration inputs, (R, H), by path of layers that ran."""
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    most = max(ROWS // max(len(context.calibration), 1), 1)

    def see(path: str, x: Tensor, units: Tensor) -> None:
        rows = units.flatten(0, 1)
        rows = rows[:: -(-len(rows) // most)].float()
        found[path].append(rows.abs() * layers[path].output.weight.detach().float().norm(dim=0))

    watch(model, layers, context, see, doing="comparing hidden units")
    return {path: torch.cat(rows) for path, rows in found.items() if rows}


def clusters_of(sizes: Tensor, count: int) -> list[list[int]]:
    """Units whose answers rise and fall together: sizes (R, U) -> ``count`` lists of U / count units, each rising.

    The first unit is the first centre.
    """
    units = sizes.T.double()
    units = units - units.mean(dim=1, keepdim=True)
    units = units / units.norm(dim=1, keepdim=True).clamp(min=1e-12)  # (U, R), products are correlations
    centres, owner = far_apart(units, count), torch.full((len(units),), -1)
    for _ in range(ROUNDS):
        before, owner = owner, evenly(parts(units @ centres.T))
        if torch.equal(before, owner):
            break
        centres = torch.stack([units[owner == number].mean(dim=0) for number in range(count)])
        centres = centres / centres.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return [torch.nonzero(owner == number).flatten().tolist() for number in range(count)]


def far_apart(units: Tensor, count: int) -> Tensor:
    """Units (U, R) -> ``count`` of them (E, R): the first, and each time that which is least like those before."""
    chosen = [0]
    nearest = parts(units @ units[0])
    while len(chosen) < count:
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, parts(units @ units[chosen[-1]]))
    return units[chosen]


def evenly(likeness: Tensor) -> Tensor:
    """The cluster (U,) of each unit, all of one size; the surest choose first: likeness (U, E)."""
    units, count = likeness.shape
    room = [units // count] * count
    owner = torch.empty(units, dtype=torch.long)
    best = likeness.topk(min(2, count), dim=1).values
    for unit in (best[:, 0] - best[:, -1]).sort(descending=True, stable=True).indices.tolist():
        liked = likeness[unit].sort(descending=True, stable=True).indices.tolist()
        owner[unit] = chosen = next(number for number in liked if room[number])
        room[chosen] -= 1
    return owner


def parts(likeness: Tensor) -> Tensor:
    """Rounded likenesses, still as floats."""
    return (likeness * DIGITS).round()
