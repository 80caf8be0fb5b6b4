"""A sampler's schedule, and calibration calls for each of its timesteps.

Shapes: B rows, T timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Inputs
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.roles import input_of
from enginewright.passes.kernel.rows import one_call, shared_inputs, some_rows
from enginewright.passes.networks import at_timestep


def even(steps: int, high: float = 1000.0) -> tuple[float, ...]:
    """So many timesteps (T), evenly spaced: from 999 to 0, or from 1 to 0 for a model that counts so."""
    if high <= 1:
        return tuple(six_digits(t) for t in np.linspace(high, 0, steps))
    return tuple(float(t) for t in np.linspace(999, 0, steps).round())


def span_of(context: Context, input: str) -> tuple[float, float]:
    """The least and the greatest timestep: what the contract says, else 0 to 1 where calls have no greater, or 1000."""
    if input in context.signature.ranges:
        low, high = context.signature.ranges[input]
        return low, 1000.0 if high == 999 else high
    met = [float(call[input].max()) for call in context.calibration if input in call and call[input].numel()]
    return 0.0, 1.0 if met and max(met) <= 1 else 1000.0


def timestep_of(asked: str, context: Context, call: Inputs) -> str:
    """The input that holds the timestep of each row: the one that a user names, else the one of that role.

    Raises:
        ToolchainError: there is none, or it holds something else.
    """
    input = input_of("timestep", asked, context.signature, call, setting="input")
    refuse_no_timestep(call, input)
    return input


def refuse_no_timestep(call: Inputs, input: str, *, one_for_all: bool = False) -> None:
    """Raise ``ToolchainError`` for an input that holds no timestep for each row (or, ``one_for_all``, for a call)."""
    shape = tuple(call[input].shape)
    if len(shape) != 1 and not (one_for_all and shape == ()):
        raise ToolchainError(f"input {input!r} has shape {shape}; one a row is needed")


def calls_at(context: Context, timesteps: Sequence[float], *, input: str, rows: int) -> list[Inputs]:
    """For each timestep, so many calibration rows that were drawn nearest to it, given that timestep."""
    shared = shared_inputs(context, context.calibration[0], like=input)
    joined = one_call(context.calibration, shared)
    calls = []
    for time in timesteps:
        order = (joined[input].double() - time).abs().argsort(stable=True)[:rows]
        calls.append(at_timestep(some_rows(joined, order, shared), time, input=input))
    return calls
