"""Programs whose engines run on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from enginewright.ground.driver import Driver
from enginewright.ground.program import Network, in_turn
from enginewright.ground.runner import clock_of, device_of, inputs_for
from enginewright.ground.signature import Arrays
from enginewright.programs import notes_of, on_one_device


class There:
    """A network on a device: it takes and gives tensors alone."""

    def __init__(self, gives: Callable[..., dict[str, torch.Tensor]], device: str = "cuda:0") -> None:
        self.gives, self.device, self.clock = gives, device, lambda: 7.0
        self.calls: list[dict[str, torch.Tensor]] = []

    def to_device(self, inputs: Arrays) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in inputs.items()}

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert all(isinstance(value, torch.Tensor) for value in inputs.values())
        self.calls.append(inputs)
        return self.gives(**inputs)

    def first_non_finite(self, inputs: dict[str, torch.Tensor]) -> str:
        return "" if all(value.isfinite().all() for value in inputs.values()) else "here"


def in_turn_on(*devices: str) -> Driver:
    """Two networks, the second reads what the first gives."""
    program = in_turn({"first": Network(takes=("x",), outputs=("middle",)), "second": Network(takes=("middle",))}, [])
    first = There(lambda x: {"middle": 2 * x}, devices[0])
    second = There(lambda middle: {"y": middle + 1}, devices[-1])
    return Driver(program=program, networks={"first": first, "second": second})


def test_what_passes_between_engines_on_a_device_stays_there() -> None:
    driver = in_turn_on("cuda:0")
    runner = on_one_device(driver)
    assert (device_of(runner), clock_of(runner)()) == ("cuda:0", 7.0)
    found = runner({"x": np.ones((2, 1), np.float32)})["y"]
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [[3], [3]]
    given = inputs_for(runner, {"x": np.ones((2, 1), np.float32)})
    assert isinstance(runner(given)["y"], torch.Tensor)
    first, second = driver.networks.values()
    assert first.calls[1]["x"].data_ptr() == given["x"].data_ptr()
    assert len(first.calls) == len(second.calls) == 2
    assert runner.first_non_finite({"x": np.full((2, 1), np.nan, np.float32)}) == "here"


def test_engines_on_several_devices_or_on_none_pass_arrays() -> None:
    for driver in (in_turn_on("cuda:0", "cuda:1"), in_turn_on("cpu")):
        assert on_one_device(driver) is driver


def test_notes_reach_a_program_through_what_runs_it_on_a_device() -> None:
    driver = in_turn_on("cuda:0")
    runner = on_one_device(driver)
    assert notes_of(runner) == []
    driver.memory.seconds["first"] = [0.002, 0.002]
    assert notes_of(runner) == ["latency is of a step; preparing a run took 2 ms more, once (median of 2)"]
