"""Bind inputs of a model to constants, and put values in the place of all that depends on them alone.

Ours; partial evaluation as in Jones, Gomard and Sestoft 1993, with modules as the unit: one call is followed operation
by operation, and each outermost module whose output depends on bound inputs and on no other becomes that output.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from passes.contract import Context, Inputs, Json, Pass, Plan
from passes.specialize.binding import Bound, Constant, bind, call_with, call_without, constant_modules
from passes.surgery import share
from toolchain.errors import ToolchainError


class FixInputs(Pass):
    """Take inputs away and compute once what they alone decide: a fixed timestep, class, style or mask."""

    by_layer: ClassVar[bool] = False

    inputs: dict[str, Any] = Field(
        default={}, description="input -> its constant: a number, or nested lists of what each row has"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Follow one call, and record the value of each module that is constant now.

        Raises ``ToolchainError`` for an unknown input, a value that does not fit, when no input is left, or when there
        is no call to follow.
        """
        example = self.example(context)
        bound = {name: bind(name, value, example, tuple(self.inputs)) for name, value in self.inputs.items()}
        call = {name: bound[name].tensor(example) if name in bound else tensor for name, tensor in example.items()}
        found = constant_modules(model, call, list(bound))
        values = {path: seen.value for path, seen in found.items() if seen.value is not None}
        return Plan(
            choice={path: {"follows": found[path].follows} for path in values},
            skipped={path: seen.reason for path, seen in found.items() if seen.value is None},
            facts={"bound": {name: vars(each) for name, each in bound.items()}},
            arrays=values,
        )

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Replace modules by their values, in place."""
        for path, entry in plan.choice.items():
            training = model.get_submodule(path).training
            model.set_submodule(path, Constant(plan.arrays[path], entry["follows"]).train(training))
        return call_without(model, bound_in(plan))

    def removed_inputs(self, plan: Plan) -> tuple[str, ...]:
        """The bound ones."""
        return tuple(plan.facts["bound"])

    def reference(self, original: nn.Module, plan: Plan) -> nn.Module:
        """The original, which is handed the constants with each call."""
        return call_without(share(original), bound_in(plan))

    def example(self, context: Context) -> Inputs:
        """A call of the model."""
        if not self.inputs:
            raise ToolchainError(f"{self.name()} needs inputs", help="such as inputs = { t = 500 }")
        example = call_with(self.inputs, context, pass_name=self.name())
        if len(self.inputs) == len(example):
            raise ToolchainError("every input is bound; an engine needs one at least")
        return example


def bound_in(plan: Plan) -> dict[str, Bound]:
    """The constants of a plan."""
    entries: dict[str, dict[str, Json]] = plan.facts["bound"]
    return {name: Bound(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in entries.items()}
