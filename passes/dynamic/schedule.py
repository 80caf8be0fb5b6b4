"""A sampler's schedule, and calibration calls for each of its timesteps.

Shapes: B rows, T timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from passes.contract import Context, Inputs
from toolchain.errors import ToolchainError, unknown


def even(steps: int) -> tuple[float, ...]:
    """So many timesteps (T) from 999 to 0."""
    return tuple(float(t) for t in np.linspace(999, 0, steps).round())


def refuse_no_timestep(call: Inputs, input: str) -> None:
    """Raise ``ToolchainError`` for an input that a call lacks, or that holds no timestep for each row."""
    if input not in call:
        raise unknown("input", input, call)
    if call[input].ndim != 1:
        raise ToolchainError(f"input {input!r} has shape {tuple(call[input].shape)}; one a row is needed")


def calls_at(context: Context, timesteps: Sequence[float], *, input: str, rows: int) -> list[Inputs]:
    """For each timestep, so many calibration rows that were drawn nearest to it, given that timestep."""
    for call in context.calibration:
        refuse_no_timestep(call, input)
    joined = {name: torch.cat([call[name] for call in context.calibration]) for name in context.calibration[0]}
    calls = []
    for time in timesteps:
        order = (joined[input].double() - time).abs().argsort(stable=True)[:rows]
        calls.append(at({name: tensor[order] for name, tensor in joined.items()}, time, input=input))
    return calls


def at(call: Inputs, time: float, *, input: str) -> Inputs:
    """The same call at another timestep."""
    return {**call, input: torch.full_like(call[input], time)}
