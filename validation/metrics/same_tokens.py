"""Share of tokens up to the first that differs from the original's, over all sequences that were continued."""

from __future__ import annotations

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Array
from enginewright.validation.contract import DecodingTask, SequenceMetric


class SameTokens(SequenceMetric):
    """1 is token for token the original. What comes after a difference answers another text, and is not counted."""

    higher_is_better = True
    relative_tolerance = None
    absolute_tolerance = 0.05  # a near tie may fall otherwise where float32 is added in another order

    def measure(self, task: DecodingTask, original: Array, candidate: Array) -> float:
        """Ids (n, L) of both.

        Raises:
            ToolchainError: there are no tokens.
        """
        if not original.size:
            raise ToolchainError("0 tokens were generated; a share needs at least 1")
        same = (original == candidate).cumprod(axis=1)
        return float(same.mean())
