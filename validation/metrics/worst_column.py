"""Relative error of the column that is furthest off: what an error over the whole output is blind to."""

from __future__ import annotations

import numpy as np

from enginewright.ground.signature import Array
from enginewright.validation.contract import OutputMetric
from enginewright.validation.statistics import Floats, columns

SMALLEST = 1e-4
"""A column is measured against no less than this part of the largest one: below it float32 rounding is no error."""

FEWEST_ROWS = 8
"""With fewer rows a column is near 0 by chance, so it is measured against the columns' root mean square."""


class WorstColumn(OutputMetric):
    """max over columns of ||a_c - b_c|| / ||b_c|| with b the original.

    A column is one place of the last axis, over everything before it: a class, a coordinate, a feature. In pictures
    (B, C, H, W) the channels count too.
    """

    higher_is_better = False

    def measure(self, original: Array, candidate: Array) -> float:
        """0 when equal; infinite when only the original is zero. 1 is a column that was lost."""
        tables = zip(columns(original), columns(candidate), strict=True)
        return float(np.max([0.0, *(_worst(b, a) for b, a in tables)]))  # numpy's max keeps a NaN


def _worst(original: Floats, candidate: Floats) -> float:
    """Both (rows, columns), in float64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.linalg.norm(candidate - original, axis=0)
        lengths = np.linalg.norm(original, axis=0)
        least = SMALLEST * lengths.max() if len(original) >= FEWEST_ROWS else np.sqrt(np.square(lengths).mean())
        shares = np.where(errors == 0, 0.0, errors / np.maximum(lengths, least))
    return float(shares.max())
