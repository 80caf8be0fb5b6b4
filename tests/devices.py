"""An accelerator that is not there: it does what it was given only when somebody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from enginewright.ground.signature import Arrays


class There:
    """An array on the device: nothing can read it there but a runner of the device."""

    def __init__(self, array: Any) -> None:
        self.array = array


class FakeDevice:
    """A queue of work and a clock that moves only when the queue is waited for."""

    def __init__(self, name: str = "cuda:0") -> None:
        self.name, self.now, self.queued, self.placed = name, 0.0, 0.0, 0

    def clock(self) -> float:
        """Wait for the queue; what the host does meanwhile takes no time."""
        self.now, self.queued = self.now + self.queued, 0.0
        return self.now

    def to_device(self, inputs: Arrays) -> dict[str, Any]:
        self.placed += 1
        return {name: There(array) for name, array in inputs.items()}


class FakeRunner:
    """Launches work of so many seconds on a device and returns at once, with outputs on the device."""

    def __init__(self, device: FakeDevice, seconds: float, function: Callable[[Any], Any] = np.negative) -> None:
        self.on, self.seconds, self.function = device, seconds, function
        self.device, self.clock, self.to_device = device.name, device.clock, device.to_device
        self.taken: list[str] = []

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.on.queued += self.seconds
        there = isinstance(inputs["x"], There)
        self.taken.append("device" if there else "host")
        given = inputs["x"].array if there else inputs["x"]
        return {"y": There(self.function(given)) if there else self.function(given)}
