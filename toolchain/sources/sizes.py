"""Sizes that a model string asks for, behind a question mark: ``batch=1..8,height=48,width=64..320..640``."""

from __future__ import annotations

import re
from typing import NamedTuple

from enginewright.ground.errors import ToolchainError, raise_faults
from enginewright.ground.signature import Dim

LIMITS = re.compile(r"-?[0-9]{1,19}(\.\.-?[0-9]{1,19}){0,2}")
"""A size, or two or three of them; no longer than the numbers that a size can be."""


class Limits(NamedTuple):
    """Smallest, typical and largest."""

    low: int
    typical: int
    high: int


def limits_from(asked: str, where: str) -> dict[str, Limits]:
    """``NAME=N``, ``NAME=LOW..HIGH`` and ``NAME=LOW..TYPICAL..HIGH``, by commas."""
    found: dict[str, Limits] = {}
    faults = []
    for part in asked.split(",") if asked else []:
        name, _, text = part.rpartition("=")
        numbers = [int(n) for n in text.split("..")] if LIMITS.fullmatch(text) else []
        if not name or not numbers or numbers != sorted(numbers):
            message = f"{part!r} is not NAME=SIZE, NAME=LOW..HIGH or NAME=LOW..TYPICAL..HIGH"
            faults.append(ToolchainError(message, where=where))
        else:
            found[name] = Limits(numbers[0], numbers[len(numbers) // 2], numbers[-1])
    raise_faults(faults)
    return found


def dim_of(name: str, limits: Limits) -> Dim | int:
    """A dimension, or its size where it can have but one."""
    if limits.low < 1:
        raise ToolchainError(f"{name} is {limits.low}; a size is at least 1")
    return limits.low if limits.low == limits.high else Dim(name=name, **limits._asdict())
