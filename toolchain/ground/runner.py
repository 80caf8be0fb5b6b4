"""Something ready to run: the original or an engine; on which device it runs, and the clock of that device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from enginewright.ground.signature import Arrays

Values = dict[str, Any]
"""Arrays or tensors by name."""

CPU = "cpu"
"""The device of a runner that names none."""

Clock = Callable[[], float]
"""Gives seconds, once all is done that a device was given to do: two readings tell a time of work, not of launches."""

ToDevice = Callable[[Arrays], Values]
"""Named arrays -> named tensors on a device, which runners there take without a copy."""


class Runner(Protocol):
    """The original or an engine, ready to run; a plain function is one.

    It may say more by attributes, which the functions below read: ``device`` (where it runs, as PyTorch names devices,
    such as ``cuda:0``), ``clock`` (a ``Clock`` of that device) and ``to_device`` (a ``ToDevice``; called with what that
    gives, it answers with tensors on the device, and nothing goes through the host).
    """

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs; numpy arrays on both sides, or tensors where it has a ``to_device``."""
        ...


def device_of(runner: Any) -> str:
    """Where a runner runs: on the CPU unless it says otherwise."""
    return getattr(runner, "device", None) or CPU


def clock_of(runner: Any) -> Clock:
    """The clock of a runner's device: the host's unless it has its own."""
    return getattr(runner, "clock", None) or time.perf_counter


def to_device_of(runner: Any) -> ToDevice | None:
    """What puts inputs on a runner's device; None on the CPU, and where a runner takes arrays alone."""
    return None if device_of(runner) == CPU else getattr(runner, "to_device", None)


def inputs_for(runner: Any, inputs: Arrays) -> Values:
    """Inputs on a runner's device, or as they are where it takes arrays alone."""
    to_device = to_device_of(runner)
    return inputs if to_device is None else to_device(inputs)
