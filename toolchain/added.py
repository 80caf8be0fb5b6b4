"""Inputs that passes add to a model: they join its contract, and whoever does not know them need not give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from passes.contract import NewInput
from toolchain.errors import ToolchainError
from toolchain.sources.contract import Model
from validation.contract import Runner
from validation.inputs import Arrays, InputSpec, completed


def with_inputs(model: Model, new: Iterable[NewInput]) -> Model:
    """The model as it is called after passes; a new input has as many rows as the first of its own.

    Raises:
        ToolchainError: it has an input of that name already.
    """
    rows = model.inputs[0].shape[:1]
    specs = list(model.inputs)
    for each in new:
        if each.name in {spec.name for spec in specs}:
            raise ToolchainError(f"the model has an input {each.name!r} already; another cannot be added")
        specs.append(InputSpec(name=each.name, shape=(*rows, *each.shape), dtype=each.dtype, default=each.default))
    return replace(model, inputs=tuple(specs))


def completing(runner: Runner, specs: Sequence[InputSpec]) -> Runner:
    """A runner that may be called without the inputs that have a default."""
    return Completing(runner, specs) if any(spec.default is not None for spec in specs) else runner


class Completing:
    """Gives a runner the inputs that a call leaves out."""

    def __init__(self, runner: Runner, specs: Sequence[InputSpec]) -> None:
        self.runner, self.specs = runner, specs

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs."""
        return self.runner(completed(inputs, self.specs))

    def first_non_finite(self, inputs: Arrays) -> str:
        """What the runner says; empty where it cannot tell."""
        locate = getattr(self.runner, "first_non_finite", None)
        return locate(completed(inputs, self.specs)) if locate else ""
