"""Cut a schedule into few stretches, so that what each needs at all of its timesteps costs least.

Shapes: T timesteps in order, U units, K stretches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def stretches(masks: Bools, costs: Floats, count: int) -> tuple[list[int], float]:
    """The cheapest cut, by dynamic programming.

    Args:
        masks: (T, U), which units are needed.
        costs: (U,), what each costs in a call.
        count: stretches, at most T.

    Returns:
        For each timestep its stretch (T), and the cost of all calls.
    """
    length = len(masks)
    price = np.full((length + 1, length + 1), np.inf)  # of a stretch from i up to j
    for i in range(length):
        needed = np.logical_or.accumulate(masks[i:], axis=0)  # (T - i, U)
        price[i, i + 1 :] = (needed @ costs) * np.arange(1, length - i + 1)
    best = np.full((min(count, length) + 1, length + 1), np.inf)
    came: Any = np.zeros_like(best, dtype=int)
    best[0, 0] = 0
    for k in range(1, len(best)):
        totals = best[k - 1][:, None] + price
        came[k], best[k] = totals.argmin(axis=0), totals.min(axis=0)
    table, end = [0] * length, length
    for k in range(len(best) - 1, 0, -1):
        start = int(came[k, end])
        table[start:end] = [k - 1] * (end - start)
        end = start
    return table, float(best[-1, length])


def masks_for(worth: Floats, costs: Floats, layers: npt.NDArray[np.int64], count: int, share: float) -> Bools:
    """Which units are needed, so that the cheapest cut computes at most a share of everything.

    Each layer keeps its worthiest unit at every timestep, even where that is more.

    Args:
        worth: (T, U), importance for its cost.
        costs: (U,).
        layers: (U,), the layer of each unit.
        count: stretches.
        share: of the cost of all units at all timesteps.

    Returns:
        Masks (T, U).
    """
    least = np.zeros(worth.shape, dtype=bool)
    for layer in np.unique(layers):
        own = np.flatnonzero(layers == layer)
        least[np.arange(len(worth)), own[worth[:, own].argmax(axis=1)]] = True
    limit = share * len(worth) * costs.sum()
    bounds = np.unique(worth)
    low, high = 0, len(bounds)  # the smallest bound that is cheap enough; len: none but the worthiest
    while low < high:
        middle = (low + high) // 2
        _, price = stretches(least | (worth >= bounds[middle]), costs, count)
        low, high = (low, middle) if price <= limit else (middle + 1, high)
    return least if low == len(bounds) else least | (worth >= bounds[low])
