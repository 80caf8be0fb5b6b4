"""The original as engines are timed beside it: each engine has it on its own device, where it can run there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import CPU, Runner, device_of, inputs_for, to_device_of
from enginewright.ground.signature import Arrays


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What one engine is timed beside, and where both run.

    Args:
        original: the key of the original among the runners that are timed.
        device: of the engine.
        original_device: of the original.
        reason: why the two are not on one device; empty where they are.
        copies_timed: whether a call's time holds copies between the host and the device.
    """

    original: str
    device: str
    original_device: str
    reason: str = ""
    copies_timed: bool = False

    @property
    def doubts(self) -> list[str]:
        """Why nothing may rest on the ratio; empty where both ran on one device."""
        if self.device == self.original_device:
            return []
        return [
            f"the engine ran on {self.device} and the original on {self.original_device}, so the ratio compares "
            f"devices as well: {self.reason}"
        ]


def originals_beside(
    original: Runner, engines: Mapping[str, Runner], call: Arrays
) -> tuple[dict[str, Runner], dict[str, Beside]]:
    """The original on each device that engines run on, tried with a call; and for each engine what it is timed beside.

    Where the original cannot run on a device, it stays where it is.
    """
    runners: dict[str, Runner] = {}
    keys: dict[str, tuple[str, str]] = {}
    devices = list(dict.fromkeys(map(device_of, engines.values()))) or [device_of(original)]
    for device in devices:
        found, reason = on_device(original, device, call)
        key = "original" if len(devices) == 1 else f"original on {device_of(found)}"
        runners.setdefault(key, found)
        keys[device] = key, reason
    return runners, {
        name: Beside(
            original=(key := keys[device_of(engine)][0]),
            device=device_of(engine),
            original_device=device_of(runners[key]),
            reason=keys[device_of(engine)][1],
            copies_timed=device_of(engine) != CPU and to_device_of(engine) is None,
        )
        for name, engine in engines.items()
    }


def on_device(original: Runner, device: str, call: Arrays) -> tuple[Runner, str]:
    """The original as it is timed on a device; where it cannot run there, as it is timed at home, and why."""
    as_timed: Callable[..., Any] = getattr(original, "as_timed", lambda device="": original)
    if device == device_of(original):
        return as_timed(), ""
    try:
        found = as_timed(device)
        if device_of(found) != device:
            return found, "the original knows one device alone"
        found(inputs_for(found, call))
    except ToolchainError as cause:
        return as_timed(), cause.message
    return found, ""
