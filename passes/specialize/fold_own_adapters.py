"""Merge the adapters that a network's own layers hold into their weights, and leave out those that are not wanted.

W + B A as in LoRA, Hu et al. 2021, arXiv:2106.09685, section 4.1, for networks that come with adapters of several
parts, such as content and style, beside their layers (``passes.traits.AdaptedLayer``). An adapter whose branches are
mixed by a gate that depends on the token goes into no weight: it stays beside the layer, unless one branch is to stand
for the mix, which is another network. The sum is made in double precision and rounded once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError, unknown
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan, macs
from enginewright.passes.kernel.surgery import put_at, share
from enginewright.passes.traits import AdaptedLayer

Becomes = Literal["base", "merged"]


class OwnAdapter(Decision):
    """What becomes of a layer with an adapter of its own."""

    becomes: Becomes = Field(description="the layer without its adapter, or with it in the weight")
    branch: str = Field("", description="branch that stands for a mix of several; empty: there is one")


class OwnAdapterFacts(Facts):
    """Whether the adapters went into weights."""

    fusable: bool = Field(description="whether all of them did, or were left out")


class FoldOwnAdapters(Pass):
    """Give layers that hold adapters the weight of both, or the base's, at the base's cost."""

    intends: ClassVar[str] = "the original with the wanted adapters alone, unfused"
    looks_for: ClassVar[str] = "layers that hold adapters of their own"
    decisions: ClassVar[tuple[type[Decision], ...]] = (OwnAdapter,)
    facts: ClassVar[type[Facts]] = OwnAdapterFacts

    keep: tuple[str, ...] | None = Field(
        default=None, description="adapters to keep, by what the model calls them; left out: all; none: the base"
    )
    branch: str = Field(
        default="", description="branch that stands for a gated mix, such as content; left out: the mix stays"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan[OwnAdapter]:
        """Sort the layers. Raises ``ToolchainError`` for an unknown part or branch."""
        layers = adapted_layers(model)
        known = sorted({layer.part for layer in layers.values()})
        for part in self.keep or () if layers else ():
            if part not in known:
                raise unknown("adapter", part, known, where="keep")
        branches = sorted({branch for layer in layers.values() for branch in layer.branches})
        if self.branch and self.branch not in branches and layers:
            raise unknown("branch", self.branch, branches, where="branch")
        choice: dict[str, OwnAdapter] = {}
        skipped: dict[str, str] = {}
        for path, layer in layers.items():
            if self.keep is not None and layer.part not in self.keep:
                choice[path] = OwnAdapter(becomes="base")
            elif not layer.branches:
                choice[path] = OwnAdapter(becomes="merged")
            elif self.branch in layer.branches:
                choice[path] = OwnAdapter(becomes="merged", branch=self.branch)
            else:
                skipped[path] = f"not fusable: {layer.mixed_by}"
        if not layers:
            skipped[""] = f"it has no {self.looks_for}"
        plan = Plan(choice=choice, skipped=skipped, facts=OwnAdapterFacts(fusable=not skipped))
        return replace(plan, facts=plan.facts.model_copy(update={"notes": tuple(self.in_words(model, plan, context))}))

    def in_words(self, model: nn.Module, plan: Plan[OwnAdapter], context: Context) -> list[str]:
        """What was fusable, what was left out, and what stays at which cost."""
        kinds = Counter(decision.becomes for decision in plan.choice.values())
        said = []
        if kinds["merged"]:
            said.append(f"fusable: the adapters of {kinds['merged']} layers went into weights, at the base's cost")
        if kinds["base"]:
            said.append(f"left out: the adapters of {kinds['base']} layers")
        if plan.skipped:
            why, cost = next(iter(plan.skipped.values())), self.cost(model, plan, context)
            said.append(f"the adapters of {len(plan.skipped)} layers stay beside them, {why}{cost}")
        return said

    def cost(self, model: nn.Module, plan: Plan[OwnAdapter], context: Context) -> str:
        """What the adapters that stay add to a call, in words; empty where there is no call to count."""
        if context.example is None:
            return ""
        after = self.rewrite(share(model), plan)
        with_them = macs(after, context.example)
        for path in plan.skipped:
            put_at(after, path, layer_in(after, path).base)
        without = macs(after, context.example)
        percent = 100 * (with_them - without) / max(without, 1)
        return f"; they add {with_them - without:,} multiply-accumulates to a call ({percent:.3g} %)"

    def rewrite(self, model: nn.Module, plan: Plan[OwnAdapter]) -> nn.Module:
        """Put a linear layer in the place of each planned one, in place."""
        for path, decision in plan.choice.items():
            layer = layer_in(model, path)
            put_at(model, path, layer.base if decision.becomes == "base" else layer.merged(decision.branch))
        return model

    def intended(self, model: nn.Module, plan: Plan[OwnAdapter], context: Context) -> nn.Module:
        """The original without the adapters that go, and with one branch where it stands for a mix; nothing merged."""
        changed = {path: each for path, each in plan.choice.items() if each.becomes == "base" or each.branch}
        if not changed:
            return model
        result = share(model)
        for path, decision in changed.items():
            layer = layer_in(result, path)
            put_at(result, path, layer.base if decision.becomes == "base" else layer.held_at(decision.branch))
        return result


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Layers that hold adapters, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def layer_in(model: nn.Module, path: str) -> AdaptedLayer:
    """The layer at a path that a plan names.

    Raises:
        ToolchainError: it holds no adapter.
    """
    layer = model.get_submodule(path)
    if not isinstance(layer, AdaptedLayer):
        raise ToolchainError(f"a {type(layer).__name__} is here, which holds no adapter of its own", where=path)
    return layer
