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
from enginewright.passes.contract import Context, Inputs, Pass, Plan, macs_by_module
from enginewright.passes.hoisting import Hoisted, hoist
from enginewright.passes.specialize.binding import call_with, constant_modules


class HoistConstants(Pass):
    """Two engines: one prepares what hangs on the run's constant inputs alone, the other does the steps."""

    by_layer: ClassVar[bool] = False
    not_after: ClassVar[tuple[str, ...]] = (
        "hoist_constants",
        "slice_width_by_timestep",
        "mixture_of_blocks",
        "reuse_blocks",
    )
    leaves: ClassVar[str] = "a network that is exported as two graphs"

    constant: tuple[str, ...] = Field(
        default=(), description="inputs that stay the same over a run, such as encoder_hidden_states"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Follow one call, and name the outermost modules that depend on constant inputs and on no other.

        Raises ``ToolchainError`` for an unknown input, when no input changes, or when there is no call to follow.
        """
        example = self.example(context)
        found = list(constant_modules(model, example, self.constant))
        if not found:
            names = ", ".join(self.constant)
            return Plan(choice={}, skipped={"": f"no module of it depends on {names} alone"})
        costs = macs_by_module(model, context.example or example)
        once, whole = sum(costs.get(path, 0) for path in found), costs.get("", 0)
        saved = bytes_of(model, found)
        share = 100 * once / max(whole, 1)
        return Plan(
            choice={path: {"macs": costs.get(path, 0)} for path in found},
            facts={
                "constant": list(self.constant),
                "macs_once": once,
                "macs_per_step": whole - once,
                "bytes_once": saved,
                "notes": [
                    f"{once:,} of {whole:,} multiply-accumulates ({share:.3g} %) and {saved:,} bytes of weights are "
                    f"needed once for a run of constant {', '.join(self.constant)}"
                ],
            },
        )

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Mark the model for the export; in PyTorch it stays whole."""
        if not plan.choice:
            return model
        return hoist(model, Hoisted(constant=tuple(plan.facts["constant"]), modules=tuple(plan.choice)))

    def example(self, context: Context) -> Inputs:
        """A call of the model."""
        if not self.constant:
            raise ToolchainError(f"{self.name()} needs constant", help='such as constant = ["encoder_hidden_states"]')
        example = call_with(self.constant, context, pass_name=self.name())
        if set(self.constant) >= example.keys():
            raise ToolchainError("every input is constant; a step needs one that changes")
        return example


def bytes_of(model: nn.Module, paths: list[str]) -> int:
    """Bytes of the parameters that these modules have and no other has."""
    inside = {id(p): p for path in paths for p in model.get_submodule(path).parameters()}
    within = {module for path in paths for module in model.get_submodule(path).modules()}
    elsewhere = {id(p) for m in model.modules() if m not in within for p in m.parameters(recurse=False)}
    return sum(p.numel() * p.element_size() for key, p in inside.items() if key not in elsewhere)
