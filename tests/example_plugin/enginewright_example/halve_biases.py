"""Halve the biases of linear layers; of no use but as an example."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from enginewright.ground.facts import FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Pass, Plan

WHOLE_BIASES = Fact("biases as they were trained", "halved biases")


class MultipliedBias(Decision):
    """The bias of one layer."""

    by: float = Field(description="what it is multiplied by")


class HalveBiases(Pass):
    """Multiply the bias of every linear layer."""

    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, WHOLE_BIASES)
    destroys: ClassVar[tuple[Fact, ...]] = (WHOLE_BIASES,)
    looks_for: ClassVar[str] = "linear layers with a bias"
    decisions: ClassVar[tuple[type[Decision], ...]] = (MultipliedBias,)

    by: float = Field(0.5, gt=0, description="what each bias is multiplied by")

    def plan(self, model: nn.Module, context: Context) -> Plan[MultipliedBias]:
        """Every linear layer that has a bias."""
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        with_bias = {path: MultipliedBias(by=self.by) for path, layer in layers.items() if layer.bias is not None}
        return Plan(choice=with_bias, skipped={path: "it has no bias" for path in layers if path not in with_bias})

    def rewrite(self, model: nn.Module, plan: Plan[MultipliedBias]) -> nn.Module:
        """New biases in place of the old ones."""
        for path, decision in plan.choice.items():
            layer = model.get_submodule(path)
            layer.bias = nn.Parameter(layer.bias.detach() * decision.by)
        return model
