"""Bind inputs of a model to constants, and put values in the place of all that depends on them alone.

Ours; partial evaluation as in Jones, Gomard and Sestoft 1993, with modules as the unit: one call is followed operation
by operation, and each outermost module whose output depends on bound inputs and on no other becomes that output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import ALL_INPUTS, Fact
from enginewright.passes.contract import Context, Decision, Inputs, Json, Pass, Plan
from enginewright.passes.kernel.rows import repeated_rows
from enginewright.passes.kernel.surgery import share
from enginewright.passes.networks import (
    each_network,
    given_to,
    networks_of,
    place_of,
    program_of,
    without_inputs,
)
from enginewright.passes.specialize.binding import (
    Bound,
    Constant,
    Seen,
    bind,
    call_with,
    call_without,
    constant_modules,
)


class ConstantModule(Decision):
    """A module that gives one value."""

    arrays: ClassVar[Mapping[str, str]] = {"": "the value, with 1 for each leading size that follows what comes in"}

    follows: int = Field(description="leading dimensions of the value that are as large as those of what comes in")


class WithoutInputs(Decision):
    """A model that takes some inputs no more, and has no constant module."""

    without: tuple[str, ...] = Field(description="names of the inputs")


class FixInputs(Pass):
    """Take inputs away and compute once what they alone decide: a fixed timestep, class, style or mask."""

    intends: ClassVar[str] = "the original with some inputs at fixed values"
    destroys: ClassVar[tuple[Fact, ...]] = (ALL_INPUTS,)
    by_layer: ClassVar[bool] = False
    decisions: ClassVar[tuple[type[Decision], ...]] = (ConstantModule, WithoutInputs)

    inputs: dict[str, Any] = Field(
        default={}, description="input -> its constant: a number, or nested lists of what each row has"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan[ConstantModule | WithoutInputs]:
        """Follow one call, and record the value of each module that is constant now.

        Raises ``ToolchainError`` for an unknown input, a value that does not fit, when no input is left, or when there
        is no call to follow.
        """
        example = self.example(context)
        bound = {name: bind(name, value, example, tuple(self.inputs)) for name, value in self.inputs.items()}
        call = {name: bound[name].tensor(example) if name in bound else tensor for name, tensor in example.items()}
        found = self.found(model, call, bound)
        values = {path: seen.value for path, seen in found.items() if seen.value is not None}
        # Where no module is constant the call has changed all the same: the model takes an input less.
        gone = {} if values else {"": WithoutInputs(without=tuple(sorted(bound)))}
        return Plan(
            choice={**gone, **{path: ConstantModule(follows=found[path].follows) for path in values}},
            skipped={path: seen.reason for path, seen in found.items() if seen.value is None},
            facts={"bound": {name: vars(each) for name, each in bound.items()}},
            arrays=values,
        )

    def found(self, model: nn.Module, call: Inputs, bound: Mapping[str, Bound]) -> dict[str, Seen]:
        """Modules that are constant now; of networks by timestep, those of each, called at a timestep of its own."""
        networks, table = networks_of(model), program_of(model).table
        if table is not None and table.input in bound:
            raise ToolchainError(
                f"{table.input} chooses the network, of which there are {len(networks)}; it cannot be bound now",
                help="bind it in a recipe without networks by timestep: one timestep needs one network",
            )
        if (start := program_of(model).start) in bound:
            raise ToolchainError(
                f"{start} says where in its sequence a call goes on, which is another place in each; it cannot be bound"
            )
        found = {}
        for name, network in networks.items():
            for path, seen in constants_of(network, given_to(model, name, call), list(bound)).items():
                found[f"{place_of(model, name)}.{path}".removeprefix(".")] = seen
        return found

    def rewrite(self, model: nn.Module, plan: Plan[ConstantModule | WithoutInputs]) -> nn.Module:
        """Replace modules by their values, in place."""
        for path, decision in plan.choice.items():
            if isinstance(decision, ConstantModule):
                training = model.get_submodule(path).training
                model.set_submodule(path, Constant(plan.array(path), decision.follows).train(training))
        bound = bound_in(plan)
        return without_inputs(each_network(model, lambda network, _: call_without(network, bound)), tuple(bound))

    def removed_inputs(self, plan: Plan) -> tuple[str, ...]:
        """The bound ones."""
        return tuple(plan.facts["bound"])

    def intended(self, model: nn.Module, plan: Plan, context: Context) -> nn.Module:
        """The original, which is handed the constants with each call."""
        return call_without(share(model), bound_in(plan))

    def example(self, context: Context) -> Inputs:
        """A call of the model."""
        if not self.inputs:
            raise ToolchainError(f"{self.name()} needs inputs", help="such as inputs = { t = 500 }")
        example = call_with(self.inputs, context, pass_name=self.name())
        if len(self.inputs) == len(example):
            raise ToolchainError("every input is bound; an engine needs one at least")
        return example


def constants_of(network: nn.Module, call: Inputs, bound: list[str]) -> dict[str, Seen]:
    """Constant modules of one network; not those in which guided rows, with the condition and without, differ."""
    found = constant_modules(network, call, bound)
    if (copies := repeated_rows(network)) == 1:
        return found
    rows = {copies * value.shape[0] for name, value in call.items() if name not in bound and value.ndim}
    apart = Seen(reason="merge_guidance runs it with the condition and without, and its rows differ")
    return {
        path: apart if seen.value is not None and seen.value.ndim and len(seen.value) in rows else seen
        for path, seen in found.items()
    }


def bound_in(plan: Plan) -> dict[str, Bound]:
    """The constants of a plan."""
    entries: dict[str, dict[str, Json]] = plan.facts["bound"]
    return {name: Bound(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in entries.items()}
