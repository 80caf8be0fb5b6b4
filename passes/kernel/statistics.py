"""What is kept of a layer's inputs while calibration calls go by: sums, sizes, histograms and a sample of rows.

Each sees every row of every call, keeps nothing of a call, and needs the same memory whatever their number.

Shapes: R rows of a call (all leading dimensions together), K inputs of a layer, S rows kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 1024
"""Rows of a layer's input that are kept of all calls together, enough to judge a scale by."""


def rows_of(x: Tensor) -> Tensor:
    """An input (..., K) as rows (R, K)."""
    return x.detach().reshape(-1, x.shape[-1])


class Products:
    """X^T X (K, K) in double precision over all rows."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Rows (R, K) of one call."""
        x = x.double()
        self.total = x.T @ x if self.total is None else self.total.addmm_(x.T, x)


class Squares:
    """Sum of squares (K,) in double precision over all rows."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Rows (R, K) of one call."""
        sums = x.double().square().sum(dim=0)
        self.total = sums if self.total is None else self.total.add_(sums)


class Magnitudes:
    """Largest and mean magnitude of each input over all rows; not finite where any of its values is not."""

    def __init__(self) -> None:
        self.largest = torch.empty(0)
        self.sums = torch.empty(0)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Rows (R, K) of one call."""
        if not len(x):
            return
        size = x.abs()
        largest, sums = size.amax(dim=0).float(), size.sum(dim=0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, largest) if self.rows else largest
        self.sums = self.sums + sums if self.rows else sums
        self.rows += len(x)

    @property
    def mean(self) -> Tensor:
        """(K,)."""
        return (self.sums / max(self.rows, 1)).float()


class SampledRows:
    """Rows drawn from all rows of all calls, each with the same chance; all of them while there are no more than kept.

    Every row gets a random key, and those of the smallest keys stay. Two samples with one seed that are offered as many
    rows take the same ones, so layers that read one tensor have the same rows.

    Args:
        seed: of the keys.
        most: rows kept.
    """

    def __init__(self, seed: int, most: int = ROWS) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.most = most
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Rows (R, K) of one call."""
        self.offer(len(x), lambda chosen: x.detach().index_select(0, chosen.to(x.device)))

    def offer(self, count: int, take: Callable[[Tensor], Tensor]) -> None:
        """So many rows of one call, of which those that stay are asked for by index: (n,) -> (n, K)."""
        keys = torch.rand(count, generator=self.generator, dtype=torch.float64)
        every = torch.cat([self.keys, keys])
        kept = every.topk(min(self.most, len(every)), largest=False).indices.sort().values
        before = len(self.keys)
        old, new = kept[kept < before], kept[kept >= before] - before
        self.keys = every[kept]
        if len(new):
            fresh = take(new).float().cpu()
            self.rows = torch.cat([self.rows[old], fresh]) if before else fresh


class LargestRow:
    """The row (1, K) that has the largest magnitude of all."""

    def __init__(self) -> None:
        self.row: Tensor | None = None
        self.size = -math.inf

    def add(self, x: Tensor) -> None:
        """Rows (R, K) of one call."""
        if len(x):
            sizes = x.detach().abs().amax(dim=1)
            number = int(sizes.argmax())
            self.offer(float(sizes[number]), lambda: x.detach()[number])

    def offer(self, size: float, take: Callable[[], Tensor]) -> None:
        """The largest magnitude of one call, whose row (K,) is asked for if it is the largest so far."""
        if size > self.size:
            self.size, self.row = size, take()[None].float().cpu()


STEPS = 1024
"""Bins of a histogram for each power of two, so that a magnitude is known to 0.1 %."""

LOWEST, HIGHEST = -60, 66
"""Powers of two between which bins lie; what is smaller counts as the smallest."""


class Histogram:
    """How often each magnitude occurs over all values of all rows, on a logarithmic scale."""

    def __init__(self) -> None:
        self.counts = torch.zeros((HIGHEST - LOWEST) * STEPS, dtype=torch.int64)
        self.zeros = 0

    def add(self, x: Tensor) -> None:
        """Values of one call, of any shape; those that are not finite do not count."""
        size = x.detach().abs().flatten().float()
        size = size[size.isfinite()]
        self.zeros += int((size == 0).sum())
        mantissa, exponent = torch.frexp(size[size > 0])  # mantissa in [0.5, 1)
        bins = (exponent.long() - LOWEST) * STEPS + ((mantissa - 0.5) * 2 * STEPS).long()
        self.counts += bins.clamp(0, len(self.counts) - 1).cpu().bincount(minlength=len(self.counts))

    @staticmethod
    def of(x: Tensor) -> Histogram:
        """That of some values alone."""
        found = Histogram()
        found.add(x)
        return found

    def percentile(self, percent: float) -> float:
        """The magnitude that so many percent of all values do not exceed; 0 without values."""
        total = self.zeros + int(self.counts.sum())
        wanted = percent / 100 * (total - 1)
        if total == 0 or wanted < self.zeros:
            return 0.0
        upto = self.counts.cumsum(0) + self.zeros
        number = int((upto <= wanted).sum())
        if number == len(upto):
            number = int(self.counts.nonzero().max())
        inside = (wanted - (int(upto[number]) - int(self.counts[number]))) / max(int(self.counts[number]), 1)
        power, step = divmod(number, STEPS)
        return math.ldexp(0.5 + (step + min(inside, 1.0)) / (2 * STEPS), power + LOWEST)


class InputStatistics:
    """What scales and roundings of a layer are chosen by: sizes, a sample of rows, and what else an algorithm asks for.

    Args:
        seed: of the sample.
        histogram: count every value by its magnitude, for percentiles.
        products: add up X^T X.
        most: rows kept.
    """

    def __init__(self, seed: int, *, histogram: bool = False, products: bool = False, most: int = ROWS) -> None:
        self.sizes, self.sample, self.largest = Magnitudes(), SampledRows(seed, most), LargestRow()
        self.histogram = Histogram() if histogram else None
        self.sums = Products() if products else None

    def add(self, x: Tensor) -> None:
        """Rows (R, K) of one call."""
        self.count(x)
        for statistic in (self.sample, self.largest, self.sums):
            if statistic is not None:
                statistic.add(x)

    def count(self, x: Tensor) -> None:
        """Values (R, K) of one call, by their magnitude alone; for those whose rows are offered otherwise."""
        self.sizes.add(x)
        if self.histogram is not None:
            self.histogram.add(x)

    @property
    def products(self) -> Tensor:
        """X^T X (K, K) over all rows, where it was asked for."""
        assert self.sums is not None
        assert self.sums.total is not None
        return self.sums.total

    def rows(self) -> Tensor:
        """The sample, and behind it the row of the largest magnitude of all: (S + 1, K)."""
        assert self.largest.row is not None
        return torch.cat([self.sample.rows, self.largest.row])


def bytes_of(inputs: int, *, histogram: bool = False, products: bool = False) -> int:
    """What the statistics of a layer of so many inputs take."""
    return 4 * ROWS * inputs + 8 * ((HIGHEST - LOWEST) * STEPS if histogram else 0) + 8 * inputs**2 * products
