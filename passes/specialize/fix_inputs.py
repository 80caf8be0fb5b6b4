"""Bind inputs of a model to constants, and put values in the place of all that depends on them alone.

Ours; partial evaluation as in Jones, Gomard and Sestoft 1993, with modules as the unit: one call is followed operation
by operation, and each outermost module whose output depends on bound inputs and on no other becomes that output. Of
several networks each holds the constants that it takes; one that takes no more than these is left out, and those that
take what it gives hold that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import ALL_INPUTS, Fact
from enginewright.ground.program import Program
from enginewright.passes.contract import Context, Decision, Inputs, Json, Pass, Plan
from enginewright.passes.kernel.rows import repeated_rows
from enginewright.passes.kernel.surgery import share
from enginewright.passes.networks import each_network, networks_of, place_of, program_of, without_inputs
from enginewright.passes.specialize.binding import (
    Bound,
    Constant,
    Seen,
    bind,
    call_with,
    call_without,
    constant_modules,
)
from enginewright.passes.specialize.bound_networks import BoundNetworks, bound_networks


class ConstantModule(Decision):
    """A module that gives one value."""

    arrays: ClassVar[Mapping[str, str]] = {"": "the value, with 1 for each leading size that follows what comes in"}

    follows: int = Field(description="leading dimensions of the value that are as large as those of what comes in")


class ConstantNetwork(Decision):
    """A network, of several, that takes constants alone: it is left out."""

    gives: tuple[str, ...] = Field(description="names of the values that others hold instead of taking them from it")

    def array_names(self, path: str) -> set[str]:
        """One for each value: that of one row, or the whole where rows share it."""
        return {f"{path}.{name}" for name in self.gives}


class WithoutInputs(Decision):
    """A model that takes some inputs no more, and has no constant module."""

    without: tuple[str, ...] = Field(description="names of the inputs")


Constants = ConstantModule | ConstantNetwork | WithoutInputs


class FixInputs(Pass):
    """Take inputs away and compute once what they alone decide: a fixed timestep, class, style or mask."""

    intends: ClassVar[str] = "the original with some inputs at fixed values"
    destroys: ClassVar[tuple[Fact, ...]] = (ALL_INPUTS,)
    by_layer: ClassVar[bool] = False
    decisions: ClassVar[tuple[type[Decision], ...]] = (ConstantModule, ConstantNetwork, WithoutInputs)

    inputs: dict[str, Any] = Field(
        default={}, description="input -> its constant: a number, or nested lists of what each row has"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan[Constants]:
        """Follow one call, and record the value of each module that is constant now.

        Raises ``ToolchainError`` for an unknown input, a value that does not fit, when no input with rows is left, or
        when there is no call to follow.
        """
        example = self.example(context)
        bound = {name: bind(name, value, example, tuple(self.inputs)) for name, value in self.inputs.items()}
        call = {name: bound[name].tensor(example) if name in bound else tensor for name, tensor in example.items()}
        networks = self.bound_networks(model, call, bound, context)
        found = {
            f"{place_of(model, name)}.{path}".removeprefix("."): seen
            for name, own in networks.others.items()
            for path, seen in constants_of(networks_of(model)[name], own.given, list(own.held)).items()
        }
        constant = {place_of(model, name): outputs for name, outputs in networks.constant.items()}
        values = {path: seen.value for path, seen in found.items() if seen.value is not None}
        # Where no module is constant the call has changed all the same: the model takes an input less.
        gone = {} if values or constant else {"": WithoutInputs(without=tuple(sorted(bound)))}
        facts = {"bound": {name: vars(each) for name, each in bound.items()}}
        if inside := held_inside(model, networks):
            facts["inside"] = inside
        return Plan(
            choice={
                **gone,
                **{path: ConstantNetwork(gives=tuple(outputs)) for path, outputs in constant.items()},
                **{path: ConstantModule(follows=found[path].follows) for path in values},
            },
            skipped={path: seen.reason for path, seen in found.items() if seen.value is None},
            facts=facts,
            arrays={f"{path}.{name}": v for path, outputs in constant.items() for name, v in outputs.items()} | values,
        )

    def bound_networks(
        self, model: nn.Module, call: Inputs, bound: Mapping[str, Bound], context: Context
    ) -> BoundNetworks:
        """Each network with the constants that it takes; networks by timestep are called at one of their own."""
        program = program_of(model)
        if program.table is not None and program.table.input in bound:
            raise ToolchainError(
                f"{program.table.input} chooses the network, of which there are {len(program.networks)}; it cannot be "
                "bound now",
                help="bind it in a recipe without networks by timestep: one timestep needs one network",
            )
        if (start := program.start) in bound:
            raise ToolchainError(
                f"{start} says where in its sequence a call goes on, which is another place in each; it cannot be bound"
            )
        shared = {*context.signature.shared, *program.shared}
        if all(name in bound or name in shared or not tensor.ndim for name, tensor in call.items()):
            left = ", ".join(name for name in call if name not in bound)
            raise ToolchainError(
                f"{left} would be left, which all rows of a call share, so that nothing says how many rows there are",
                help="leave an input that has a row for each sample",
            )
        return bound_networks(model, call, bound, shared)

    def rewrite(self, model: nn.Module, plan: Plan[Constants]) -> nn.Module:
        """Replace modules by their values, and leave constant networks out, in place."""
        for path, decision in plan.choice.items():
            if isinstance(decision, ConstantModule):
                training = model.get_submodule(path).training
                model.set_submodule(path, Constant(plan.array(path), decision.follows).train(training))
        held, passed = held_in(plan, program_of(model)), passed_in(plan)
        each_network(model, lambda net, name: call_without(net, held[name]) if name in held else net)
        gone = [
            name for name in networks_of(model) if isinstance(plan.choice.get(place_of(model, name)), ConstantNetwork)
        ]
        return without_inputs(model, (*bound_in(plan), *passed), gone=gone)

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


def held_inside(model: nn.Module, networks: BoundNetworks) -> dict[str, dict[str, dict[str, Json]]]:
    """What networks that say what they take hold, as JSON; null for the value of what another network gave."""
    return {
        name: {
            each: {**vars(how), "value": None if isinstance(how.value, Tensor) else how.value}
            for each, how in own.held.items()
        }
        for name, own in networks.others.items()
        if own.held and program_of(model).networks[name].takes is not None
    }


def bound_in(plan: Plan) -> dict[str, Bound]:
    """The constants of a plan."""
    return {name: read_bound(entry) for name, entry in plan.facts["bound"].items()}


def passed_in(plan: Plan) -> dict[str, Tensor]:
    """What the constant networks of a plan gave to others."""
    return {
        name: plan.array(f"{path}.{name}")
        for path, decision in plan.choice.items()
        if isinstance(decision, ConstantNetwork)
        for name in decision.gives
    }


def held_in(plan: Plan, program: Program) -> dict[str, dict[str, Bound]]:
    """For each network that takes constants, those."""
    passed, inside = passed_in(plan), plan.facts.get("inside", {})
    found = {name: bound_in(plan) for name, own in program.networks.items() if own.takes is None}
    for name, entries in inside.items():
        found[name] = {
            each: read_bound({**entry, "value": passed[each]} if each in passed else entry)
            for each, entry in entries.items()
        }
    return found


def read_bound(entry: Mapping[str, Json]) -> Bound:
    """A constant out of JSON."""
    return Bound(**{**entry, "shape": tuple(entry["shape"])})
