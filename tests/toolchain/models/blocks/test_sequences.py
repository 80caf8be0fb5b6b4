from __future__ import annotations

import numpy as np
import pytest

from enginewright.models.blocks.sequences import FALSE, PADDING, PENDING, TASKS, TRUE, UNLABELLED


@pytest.mark.parametrize(
    ("task", "symbols", "labels"),
    [
        ("reverse", [0, 1, 2, 2], [2, 2, 1, 0]),
        ("histogram", [5, 0, 5, 5], [2, 0, 2, 2]),
        ("double-histogram", [3, 3, 1, 0], [0, 0, 1, 1]),
        ("sort", [4, 0, 4, 2], [0, 2, 4, 4]),
        ("most-frequent", [2, 4, 4, 1, 2, 0], [2, 4, 1, 0, 6, 6]),
        ("dyck-1", [0, 0, 1, 1, 1, 0], [PENDING, PENDING, PENDING, TRUE, FALSE, FALSE]),
        ("dyck-2", [0, 1, 2, 0, 1, 1], [PENDING, TRUE, PENDING, PENDING, PENDING, FALSE]),
    ],
)
def test_the_answer_is_that_of_the_task(task: str, symbols: list[int], labels: list[int]) -> None:
    assert TASKS[task].answer(symbols) == labels


@pytest.mark.parametrize(("task", "vocabulary", "room"), [("sort", 8, 6), ("most-frequent", 8, 7), ("dyck-2", 6, 15)])
def test_marks_and_symbols_fill_the_vocabulary(task: str, vocabulary: int, room: int) -> None:
    ids, labels = TASKS[task].sequences(5000, seed=0)
    assert (TASKS[task].vocabulary, TASKS[task].room) == (vocabulary, room)
    assert set(np.unique(ids[:, 1:])) | {1} == set(range(vocabulary)) - ({PADDING} if "dyck" in task else set())
    assert np.unique(labels).tolist() == [UNLABELLED, *range(TASKS[task].labels)]
    assert (labels != UNLABELLED).sum(1).max() == room


def test_a_closed_sequence_is_begun_ended_and_padded() -> None:
    assert TASKS["sort"].tokens([4, 0]) == [1, 7, 3, 2, 0, 0, 0, 0]
    assert TASKS["sort"].labelled([4, 0]) == [-1, 0, 4, -1, -1, -1, -1, -1]
    assert TASKS["histogram"].tokens([4, 0]) == [1, 6, 2, 0, 0, 0, 0, 0]


def test_half_of_the_brackets_are_right_from_start_to_end() -> None:
    _, labels = TASKS["dyck-2"].sequences(2000, seed=1)
    assert 0.48 < (labels[:, -1] != FALSE).mean() < 0.54


def test_the_same_seed_draws_the_same_sequences() -> None:
    one, two, other = (TASKS["sort"].sequences(50, seed)[0] for seed in (0, 0, 1))
    assert (one == two).all()
    assert (one != other).any()
