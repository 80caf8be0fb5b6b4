"""Scores of weights that ship, on what was drawn for this alone: what claims of accuracy are held against."""

from __future__ import annotations

from enginewright import sources
from enginewright.models.blocks.sequences import TASKS
from enginewright.training.transformer_programs import accuracy

SEQUENCES, SEED = 5_000, 77


def labels_right(size: str) -> float:
    """The share of labels that a Transformer Program of this size gets right, sequences of all lengths alike."""
    program = sources.load(f"transformer_programs:{size}").module
    return accuracy(program, *TASKS[size].sequences(SEQUENCES, seed=SEED))  # type: ignore[arg-type]
