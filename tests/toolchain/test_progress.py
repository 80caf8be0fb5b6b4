"""What one reads while waiting; the clock is made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from enginewright.measure import telling
from enginewright.progress import Pace, Progress, in_words
from enginewright.validation.contract import SamplingTask


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rest_takes_as_long_as_the_pace_so_far_says() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.left(0, 10) is None
    clock.now += 1
    assert pace.left(1, 10) is None, "a second is too short to tell"
    clock.now += 3
    assert pace.left(2, 10) == pytest.approx(4 / 2 * 8)
    clock.now += 6
    assert pace.left(5, 10) == pytest.approx(10 / 5 * 5)


def test_another_count_begins_anew_and_one_that_was_resumed_counts_from_there() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.left(0, 10)
    clock.now += 10
    assert pace.left(5, 10) == pytest.approx(10)
    assert pace.left(0, 10) is None, "fewer are done: a new count"
    clock.now += 10
    assert pace.left(0, 20) is None, "another total"
    resumed = Pace(clock)
    assert resumed.left(900, 1000) is None
    clock.now += 10
    assert resumed.left(950, 1000) == pytest.approx(10)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (5.4, "5 s"), (89, "89 s"), (200, "3 min"), (7500, "2 h 5 min")]
)
def test_waiting_is_said_in_units_that_fit(seconds: float, said: str) -> None:
    assert in_words(seconds) == said


def test_plain_output_tells_the_time_left_and_not_too_often(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    with progress.stage("step 1: quantize_int8"):
        for number in range(16):
            progress.count(number, 16, "calibrating")
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1: quantize_int8 …"
    assert lines[1] == "  calibrating (1/16)"
    assert lines[2] == "  calibrating (4/16, about 13 s to go)"
    assert lines[-1] == "step 1: quantize_int8: 16.0 s"
    assert len(lines) < 9


def test_a_terminal_hears_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    class Status:
        def update(self, text: str) -> None:
            heard.append(text)

        def stop(self) -> None:
            heard.append("stopped")

    clock = Clock()
    progress = Progress(clock=clock)
    with progress.stage("recover"):
        progress.status = Status()
        for number in range(4):
            progress.count(number, 4, "training")
            clock.now += 1.5
        progress.count(3, 4, "recovering: loss 0.1, 7 s to go")
    assert heard == [
        "recover: training (1/4)",
        "recover: training (2/4)",
        "recover: training (3/4, about 3 s to go)",
        "recover: training (4/4, about 2 s to go)",
        "recover: recovering: loss 0.1, 7 s to go (4/4)",
        "stopped",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=True)
    with progress.stage("load"):
        progress.count(0, 2, "calibrating")
    assert capsys.readouterr().err == ""


def test_a_sampling_run_tells_of_its_calls() -> None:
    told: list[Any] = []

    class Heard(Progress):
        def count(self, done: int, total: int, text: str) -> None:
            told.append((done, total))

        def say(self, text: str) -> None:
            told.append(text)

    empty = np.zeros((0, 1))
    task = SamplingTask(
        sample=lambda runner, n, seed: empty,
        asked=lambda n: empty,
        read=lambda pictures: (empty, empty),
        real=empty,
        real_again=empty,
        samples=1,
        floor=1,
        calls=lambda n: 2,
    )
    call = telling(lambda inputs: inputs, task, 8, "drawing", Heard(quiet=True))
    for _ in range(3):
        assert call({"x": empty})["x"] is empty
    assert told == ["drawing", (0, 2), (1, 2), "drawing: call 3"]


def test_the_shipped_task_knows_its_calls() -> None:
    from enginewright.models.blocks import digits

    calls = 0

    def runner(inputs: dict[str, Any]) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return {"y": np.repeat(inputs["x"] * 0, 2, axis=1)}

    task = digits.digits_task(none=10)
    task.sample(runner, 40, 0)
    assert task.calls is not None
    assert calls == task.calls(40)
