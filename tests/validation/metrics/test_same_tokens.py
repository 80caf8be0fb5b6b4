from __future__ import annotations

import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Array
from enginewright.validation.contract import DecodingTask
from enginewright.validation.metrics.same_tokens import SameTokens

TASK = DecodingTask(sample=lambda runner, n, seed: np.zeros((n, 4)), samples=2)


@pytest.mark.parametrize(
    ("candidate", "share"),
    [
        ([[1, 2, 3, 4], [5, 6, 7, 8]], 1.0),
        ([[1, 2, 0, 4], [5, 6, 7, 8]], 0.75),  # the last token of the first row follows another text
        ([[0, 2, 3, 4], [0, 6, 7, 8]], 0.0),
    ],
)
def test_tokens_count_up_to_the_first_that_differs(candidate: list[list[int]], share: float) -> None:
    original: Array = np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert SameTokens().measure(TASK, original, np.asarray(candidate)) == share


def test_no_tokens_have_no_share() -> None:
    with pytest.raises(ToolchainError, match="0 tokens"):
        SameTokens().measure(TASK, np.zeros((2, 0)), np.zeros((2, 0)))
