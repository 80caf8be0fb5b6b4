import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.metrics.judged_as_asked import JudgedAsAsked


def test_the_share_of_classes_as_asked(task, drawn):
    assert JudgedAsAsked().measure(task, drawn(), drawn(classes=[0, 1, 2, 0, 0, 0, 0, 1])) == 6 / 8


def test_the_original_does_not_count(task, drawn):
    wrong = drawn(classes=[2, 2, 1])
    assert JudgedAsAsked().measure(task, wrong, drawn(classes=[0, 1, 2])) == 1.0


def test_nothing_drawn_is_refused(task, drawn):
    with pytest.raises(ToolchainError, match="0 samples"):
        JudgedAsAsked().measure(task, drawn(), drawn())
