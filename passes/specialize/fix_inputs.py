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
from enginewright.passes.contract import Context, Decision, Facts, Inputs, Json, Part, Pass, Plan
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


class HeldConstant(Part):
    """A constant in the place of an input: see ``Bound``."""

    value: Json = Field(description="what every row has; null: it is among the arrays, as another network gave it")
    dtype: str = Field(description="of the input")
    shape: tuple[int, ...] = Field(description="of the input, in the call that was followed")
    like: str = Field(description="an input that is kept")
    shared: int = Field(description="leading dimensions that the two have in common")


class BoundFacts(Facts):
    """The constants in the place of inputs."""

    bound: dict[str, HeldConstant] = Field(description="of the whole model, by input")
    inside: dict[str, dict[str, HeldConstant]] = Field(
        {}, description="by network that says what it takes: what it holds, of the inputs and of what others gave"
    )


class FixInputs(Pass):
    """Take inputs away and compute once what they alone decide: a fixed timestep, class, style or mask."""

    intends: ClassVar[str] = "the original with some inputs at fixed values"
    destroys: ClassVar[tuple[Fact, ...]] = (ALL_INPUTS,)
    by_layer: ClassVar[bool] = False
    decisions: ClassVar[tuple[type[Decision], ...]] = (ConstantModule, ConstantNetwork, WithoutInputs)
    facts: ClassVar[type[Facts]] = BoundFacts

    inputs: dict[str, Any] = Field(
        default={}, description="input -> its constant: a number, or nested lists of what each row has"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan[Constants, BoundFacts]:
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
        facts = BoundFacts(bound={name: held_constant(each) for name, each in bound.items()})
        if inside := held_inside(model, networks):
            facts = facts.model_copy(update={"inside": inside})
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

    def rewrite(self, model: nn.Module, plan: Plan[Constants, BoundFacts]) -> nn.Module:
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

    def removed_inputs(self, plan: Plan[Constants, BoundFacts]) -> tuple[str, ...]:
        """The bound ones."""
        return tuple(plan.facts.bound)

    def intended(self, model: nn.Module, plan: Plan[Constants, BoundFacts], context: Context) -> nn.Module:
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


def held_constant(bound: Bound) -> HeldConstant:
    """A constant as facts have it."""
    return HeldConstant(**{**vars(bound), "value": None if isinstance(bound.value, Tensor) else bound.value})


def held_inside(model: nn.Module, networks: BoundNetworks) -> dict[str, dict[str, HeldConstant]]:
    """What networks that say what they take hold."""
    return {
        name: {each: held_constant(how) for each, how in own.held.items()}
        for name, own in networks.others.items()
        if own.held and program_of(model).networks[name].takes is not None
    }


def bound_in(plan: Plan[Constants, BoundFacts]) -> dict[str, Bound]:
    """The constants of a plan."""
    return {name: Bound(**vars(held)) for name, held in plan.facts.bound.items()}


def passed_in(plan: Plan[Constants, BoundFacts]) -> dict[str, Tensor]:
    """What the constant networks of a plan gave to others."""
    return {
        name: plan.array(f"{path}.{name}")
        for path, decision in plan.choice.items()
        if isinstance(decision, ConstantNetwork)
        for name in decision.gives
    }


def held_in(plan: Plan[Constants, BoundFacts], program: Program) -> dict[str, dict[str, Bound]]:
    """For each network that takes constants, those."""
    passed = passed_in(plan)
    found = {name: bound_in(plan) for name, own in program.networks.items() if own.takes is None}
    for name, entries in plan.facts.inside.items():
        found[name] = {
            each: Bound(**{**vars(held), "value": passed.get(each, held.value)}) for each, held in entries.items()
        }
    return found
