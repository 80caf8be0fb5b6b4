"""PyTorch's module again, under another name: the least that a target can be."""

from __future__ import annotations

from enginewright.targets.pytorch_engine import PyTorch


class Doubling(PyTorch):
    """Runs the optimized module."""
