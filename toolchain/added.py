"""Inputs that passes add to a model or take from it, and what the model is then intended to compute.

Added ones join the contract, and whoever does not know them need not give them. Those that have a range are drawn where
engines are compared, and what is intended takes them too. Removed ones leave the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from enginewright.ground.driver import in_groups
from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Clock, Runner, ToDevice, clock_of, device_of, to_device_of
from enginewright.ground.signature import Arrays, InputSpec, in_multiples, rows_of, shared_by_rows
from enginewright.passes.contract import Context, NewInput, Pass, Plan
from enginewright.sources.contract import Model
from enginewright.validation.inputs import completed, draw


def with_inputs(model: Model, new: Iterable[NewInput]) -> Model:
    """The model as it is called after passes; a new input has a row for each sample, unless all share it.

    Raises:
        ToolchainError: it has an input of that name already.
    """
    rows = (rows_of(model.inputs),)
    specs = list(model.inputs)
    for each in new:
        if each.name in {spec.name for spec in specs}:
            raise ToolchainError(f"the model has an input {each.name!r} already; another cannot be added")
        shape = tuple(size for size in ((*rows, *each.shape) if not each.shared else each.shape) if size is not None)
        low, high = each.range or (None, None)
        specs.append(
            InputSpec(
                name=each.name,
                shape=shape,
                dtype=each.dtype,
                low=low,
                high=high,
                default=each.default,
                drawn=each.range is not None,
                role=each.role,
            )
        )
    return replace(model, inputs=tuple(specs))


def in_rows(model: Model, together: int) -> Model:
    """The model where so many rows of a call belong together: its sizes say so, and calls like its own keep to it.

    Whole jobs are left out, because they draw each sample alone.
    """
    if together == 1:
        return model
    shared = shared_by_rows(model.inputs)

    def grouped(calls: Sequence[Arrays]) -> list[Arrays]:
        return in_groups(calls, shared, together, lambda parts: np.concatenate([*parts]))

    make, own = model.realistic, model.example
    return replace(
        model,
        inputs=in_multiples(model.inputs, together),
        task=None,
        realistic=make and (lambda count, seed: grouped(make(count, seed))),
        example=None if own is None else grouped([own])[0],
    )


def intended_by(model: Model, step: Pass, plan: Plan, context: Context) -> Model:
    """What is intended after a step, given what was before: see ``Pass.intended``.

    Whole sampling runs are left out where an input was removed, because they vary what is fixed now.
    """
    if step.intends:
        model = replace(model, module=step.intended(model.module, plan, context))
        model = with_drawn(model, [each for each in step.new_inputs(plan) if each.range is not None])
    model = in_rows(model, step.rows_together(plan))
    gone = step.removed_inputs(plan)
    if not gone:
        return model
    kept = tuple(spec for spec in model.inputs if spec.name not in gone)
    own = None if model.example is None else {k: v for k, v in model.example.items() if k not in gone}
    return replace(model, inputs=kept, task=None, realistic=narrowed(model, gone), example=own)


def with_drawn(model: Model, new: Sequence[NewInput]) -> Model:
    """The model with inputs that every call of its own has too, drawn within their ranges."""
    if not new:
        return model
    before = {spec.name for spec in model.inputs}
    grown = with_inputs(model, new)
    specs = [spec for spec in grown.inputs if spec.name not in before]
    own = None if model.example is None else {**model.example, **draw(specs, seed=0)}
    return replace(grown, realistic=completed_by(model, specs), example=own)


def completed_by(model: Model, specs: Sequence[InputSpec]) -> Callable[[int, int], list[Arrays]] | None:
    """Calls like the model's own, with further inputs drawn."""
    if (make := model.realistic) is None:
        return None
    return lambda count, seed: [
        {**call, **draw(specs, seed=seed + number)} for number, call in enumerate(make(count, seed))
    ]


def intended_by_all(model: Model, steps: Iterable[tuple[Pass, Plan]], context: Context) -> Model:
    """What is intended after these steps, in the order they were taken."""
    for step, plan in steps:
        model = intended_by(model, step, plan, context)
    return model


def narrowed(model: Model, gone: Sequence[str]) -> Callable[[int, int], list[Arrays]] | None:
    """Calls like the model's own, without some inputs."""
    if (make := model.realistic) is None:
        return None
    return lambda count, seed: [{k: v for k, v in call.items() if k not in gone} for call in make(count, seed)]


def completing(runner: Runner, specs: Sequence[InputSpec]) -> Runner:
    """A runner that may be called without the inputs that have a default."""
    return Completing(runner, specs) if any(spec.default is not None for spec in specs) else runner


class Completing:
    """Gives a runner the inputs that a call leaves out."""

    def __init__(self, runner: Runner, specs: Sequence[InputSpec]) -> None:
        self.runner, self.specs = runner, specs
        self.device: str = device_of(runner)
        self.clock: Clock = clock_of(runner)

    @property
    def to_device(self) -> ToDevice | None:
        """Puts a call on the runner's device, with the inputs that it leaves out; None where the runner cannot."""
        to_device = to_device_of(self.runner)
        return None if to_device is None else lambda inputs: to_device(completed(inputs, self.specs))

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs."""
        return self.runner(completed(inputs, self.specs))

    def first_non_finite(self, inputs: Arrays) -> str:
        """What the runner says; empty where it cannot tell."""
        locate = getattr(self.runner, "first_non_finite", None)
        return locate(completed(inputs, self.specs)) if locate else ""
