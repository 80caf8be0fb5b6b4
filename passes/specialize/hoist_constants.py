"""Compute once for a sampling run what does not change from step to step: text keys and values, pooled embeddings.

Ours; partial evaluation by binding time as in Jones, Gomard and Sestoft 1993: of the inputs some are known when a run
begins, the others when a step does. The model goes out as two graphs, of which the first gives tensors that the second
reads; operations are parted one by one in the exported graph (``targets/split_graph.py``), and the plan names the
modules among them, found by following one call.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import UNPARTED, Fact
from enginewright.ground.program import Hoisted
from enginewright.ground.signature import Role
from enginewright.passes.contract import Context, Decision, Facts, Inputs, Pass, Plan, macs, macs_by_module
from enginewright.passes.networks import given_to, hoist, local, networks_of, place_of, program_of
from enginewright.passes.specialize.binding import call_with, constant_modules

CONSTANT: tuple[Role, ...] = ("condition", "guidance", "mask", "positions")
"""Roles of inputs that stay the same over a sampling run."""


class HoistedModule(Decision):
    """A module that is computed once for a run."""

    macs: int = Field(description="multiply-accumulates of one call of it")


class HoistedFacts(Facts):
    """What stays the same over a run, and what that saves."""

    constant: tuple[str, ...] = Field(description="inputs that stay the same")
    macs_once: int = Field(description="multiply-accumulates that a run does once")
    macs_per_step: int = Field(description="multiply-accumulates that are left for each step")
    bytes_once: int = Field(description="of weights that a run reads once")


class HoistConstants(Pass):
    """Two engines of each network: one prepares what hangs on a run's constant inputs alone, one does the steps."""

    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (UNPARTED,)
    destroys: ClassVar[tuple[Fact, ...]] = (UNPARTED,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (HoistedModule,)
    facts: ClassVar[type[Facts]] = HoistedFacts

    constant: tuple[str, ...] = Field(
        default=(), description="inputs that stay the same over a run; empty: conditions, guidance, masks and positions"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan[HoistedModule, HoistedFacts]:
        """Follow one call, and name the outermost modules that depend on constant inputs and on no other.

        Raises ``ToolchainError`` for an unknown input, when no input changes, or when there is no call to follow.
        """
        resolved = self.resolved(context)
        example = resolved.example(context)
        costs: dict[str, int] = {}
        for name, network in networks_of(model).items():
            place = place_of(model, name)
            own = given_to(model, name, example)
            constant = [each for each in resolved.constant if each in own]
            if not constant:
                continue
            by_module = macs_by_module(network, given_to(model, name, context.example or example))
            for path in constant_modules(network, own, constant):
                costs[f"{place}.{path}".removeprefix(".")] = by_module.get(path, 0)
        names = ", ".join(resolved.constant)
        if not costs:
            return Plan(choice={}, skipped={"": f"no module of it depends on {names} alone"})
        whole = macs(model, context.example or example)
        once = round(sum(cost * time_share(model, path) for path, cost in costs.items()))
        saved = bytes_of(model, list(costs))
        share = 100 * once / max(whole, 1)
        return Plan(
            choice={path: HoistedModule(macs=cost) for path, cost in costs.items()},
            facts=HoistedFacts(
                constant=resolved.constant,
                macs_once=once,
                macs_per_step=whole - once,
                bytes_once=saved,
                notes=(
                    f"{once:,} of {whole:,} multiply-accumulates ({share:.3g} %) and {saved:,} bytes of weights are "
                    f"needed once for a run of constant {names}",
                ),
            ),
        )

    def rewrite(self, model: nn.Module, plan: Plan[HoistedModule, HoistedFacts]) -> nn.Module:
        """Mark the model for the export; in PyTorch it stays whole."""
        if not plan.choice:
            return model
        found = {}
        for name in networks_of(model):
            takes = program_of(model).networks[name].takes
            constant = tuple(each for each in plan.facts.constant if takes is None or each in takes)
            if modules := tuple(local(plan.choice, place_of(model, name))):
                found[name] = Hoisted(constant=constant, modules=modules)
        return hoist(model, found)

    def resolved(self, context: Context) -> HoistConstants:
        """The same with the inputs that stay the same over a run. Raises ``ToolchainError`` where none is known to."""
        if self.constant:
            return self
        call = next(iter(context.calibration), context.example) or {}
        found = context.signature.of_role(*CONSTANT, among=call)
        if not found:
            raise ToolchainError(
                "no input of the model is known to stay the same over a run",
                help=f"its inputs: {', '.join(call)}; set constant to some of them",
            )
        return self.model_copy(update={"constant": tuple(found)})

    def example(self, context: Context) -> Inputs:
        """A call of the model."""
        example = call_with(self.constant, context, pass_name=self.name())
        if set(self.constant) >= example.keys():
            raise ToolchainError("every input is constant; a step needs one that changes")
        return example


def time_share(model: nn.Module, path: str) -> float:
    """The share of the steps of a run in which the network runs that a module lies in."""
    program = program_of(model)
    if program.table is None:
        return 1.0
    name = next(name for name in networks_of(model) if local({path: None}, place_of(model, name)))
    on = [any(call.network == name for call in program.ways[way].calls) for way in program.table.ways]
    return sum(on) / len(on)


def bytes_of(model: nn.Module, paths: list[str]) -> int:
    """Bytes of the parameters that these modules have and no other has."""
    inside = {id(p): p for path in paths for p in model.get_submodule(path).parameters()}
    within = {module for path in paths for module in model.get_submodule(path).modules()}
    elsewhere = {id(p) for m in model.modules() if m not in within for p in m.parameters(recurse=False)}
    return sum(p.numel() * p.element_size() for key, p in inside.items() if key not in elsewhere)
