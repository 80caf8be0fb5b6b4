from __future__ import annotations

import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.contract import ClassifyingTask
from enginewright.validation.metrics.accuracy import Accuracy

TASK = ClassifyingTask(sample=lambda runner, n, seed: np.zeros((n, 2)), samples=4)


def test_it_is_the_share_of_true_classes_whatever_the_original_tells() -> None:
    original, candidate = np.array([[1, 2], [1, 2]]), np.array([[1, 1], [2, 2], [3, 0], [4, 4]])
    assert Accuracy().measure(TASK, original, candidate) == 0.75
    assert Accuracy().measure(TASK, candidate, original) == 0.0


def test_no_inputs_have_no_share() -> None:
    with pytest.raises(ToolchainError, match="0 inputs"):
        Accuracy().measure(TASK, np.zeros((0, 2)), np.zeros((0, 2)))
