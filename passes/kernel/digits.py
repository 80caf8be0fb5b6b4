"""Figures of a plan, cut to digits that another machine gives too."""

from __future__ import annotations


def six_digits(value: float) -> float:
    """A figure in six significant digits."""
    return float(f"{value:.6g}")
