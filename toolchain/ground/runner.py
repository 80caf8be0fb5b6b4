"""Something ready to run: the original or an engine."""

from __future__ import annotations

from typing import Protocol

from enginewright.ground.signature import Arrays


class Runner(Protocol):
    """The original or an engine, ready to run."""

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs; numpy arrays on both sides."""
        ...
