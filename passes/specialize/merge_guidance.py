"""Classifier-free guidance in one call: both rows of each sample run in one batch, and are combined inside.

Source: Ho and Salimans 2022, arXiv:2207.12598, equation 6, written as e = e_u + w (e_c - e_u) with w = 1 + their w.
Departures: none for one output; where a model predicts a variance too, ``channels`` says how many leading channels are
guided, and the rest is that of the row with the condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import INDEPENDENT_ROWS, SINGLE_ROWS, STATELESS_CALLS, UNBLENDED_ATTENTION, Fact
from enginewright.passes.contract import Context, Decision, Inputs, Json, NewInput, Pass, Plan
from enginewright.passes.kernel.roles import input_of
from enginewright.passes.kernel.rows import Repeating, shared_inputs, two_of_each
from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.wrap import Call, wrap
from enginewright.passes.networks import each_network

SCALE = "guidance_scale"


class GuidedRows(Decision):
    """How the rows of a call are guided."""

    condition: str = Field(description="input that carries the condition")
    none: Json = Field(description="its value for no condition: a number, or lists of what a row has")
    channels: int | None = Field(description="leading channels of the output that are guided; null: all")
    shared: tuple[str, ...] = Field((), description="inputs that all rows of a call share")


class MergeGuidance(Pass):
    """Double the batch inside, with the condition and without, and give e_u + w (e_c - e_u)."""

    intends: ClassVar[str] = "the original guided by two calls"
    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (SINGLE_ROWS, UNBLENDED_ATTENTION, STATELESS_CALLS, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (SINGLE_ROWS,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (GuidedRows,)

    condition: str = Field(default="", description="input that carries the condition; empty: the one of that role")
    none: Any = Field(default=None, description="its value for no condition: a number, or lists of what a row has")
    scale: float = Field(default=4.0, description="w; what the input guidance_scale is where a call leaves it out")
    fixed: bool = Field(default=False, description="bake the scale in, instead of an input guidance_scale (batch)")
    channels: int | None = Field(
        default=None, ge=1, description="leading channels of the output that are guided; left out: all"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan[GuidedRows]:
        """Check what was asked. Raises ``ToolchainError`` for an unknown condition or a value that does not fit it."""
        del model
        example = next(iter(context.calibration), context.example)
        if not example:
            raise ToolchainError(f"{self.name()} looks at one call of the model and got none")
        condition = input_of("condition", self.condition, context.signature, example, setting="condition")
        if condition in context.signature.shared:
            raise ToolchainError(f"all rows of a call share input {condition!r}, so it cannot be a row's condition")
        if self.none is None:
            raise ToolchainError(
                f"{self.name()} needs none: what {condition} is when there is no condition",
                help="for class labels often the number of classes",
            )
        try:
            torch.tensor(self.none, dtype=torch.float64).expand(example[condition].shape[1:])
        except (RuntimeError, TypeError, ValueError) as cause:
            shape = tuple(example[condition].shape[1:])
            raise ToolchainError(f"none is {self.none!r}, which is no row of {condition}, {shape}") from cause
        shared = shared_inputs(context, example, like=condition)
        how = GuidedRows(condition=condition, none=self.none, channels=self.channels, shared=shared)
        return Plan(choice={"": how})

    def rewrite(self, model: nn.Module, plan: Plan[GuidedRows]) -> nn.Module:
        """Let each call run both rows at once; paths of modules stay as they were."""
        how = plan.choice[""]
        return each_network(model, lambda net, _: guided(net, how, self.scale, fixed=self.fixed, at_once=True))

    def new_inputs(self, plan: Plan) -> tuple[NewInput, ...]:
        """The scale, if it is not baked in."""
        return () if self.fixed else (NewInput(name=SCALE, default=self.scale),)

    def intended(self, model: nn.Module, plan: Plan[GuidedRows], context: Context) -> nn.Module:
        """Two calls of the original."""
        return guided(share(model), plan.choice[""], self.scale, fixed=self.fixed, at_once=False)


def guided(model: nn.Module, how: GuidedRows, scale: float, *, fixed: bool, at_once: bool) -> nn.Module:
    """Let a model guide its own output, in place."""
    wrap(model, Guided(how=how, scale=scale, fixed=fixed, copies=2 if at_once else 1))
    return model


@dataclass(frozen=True, kw_only=True)
class Guided(Repeating):
    """A model called with and without its condition.

    Args:
        how: as the plan has it.
        scale: w where a call says nothing.
        fixed: whether a call cannot.
        copies: 2: both in one call, the rows of one after those of the other; 1: in two calls.
    """

    how: GuidedRows
    scale: float
    fixed: bool

    @property
    def adds(self) -> tuple[str, ...]:
        """The scale, unless it is fixed."""
        return () if self.fixed else (SCALE,)

    def answer(self, forward: Call, inputs: dict[str, Any]) -> Any:
        """Answer a call."""
        given, how = inputs.pop(SCALE, None), self.how
        scale = self.scale if given is None else given
        condition: Tensor = inputs[how.condition]
        none = torch.tensor(how.none, dtype=condition.dtype, device=condition.device).expand_as(condition)
        if self.copies == 1:
            with_it, without = forward(**inputs), forward(**{**inputs, how.condition: none})
            return combined(with_it, without, scale, how.channels)
        twice: Inputs = two_of_each(inputs, how.shared)
        twice[how.condition] = torch.cat([condition, none])
        leaves, form = pytree.tree_flatten(forward(**twice))
        # Not ``chunk``, which rounds: what it asks of an open number of rows the exporter cannot prove.
        halves = [leaf.unflatten(0, (2, -1)).unbind(0) for leaf in leaves]
        with_it, without = (pytree.tree_unflatten([half[i] for half in halves], form) for i in (0, 1))
        return combined(with_it, without, scale, how.channels)


def combined(with_it: Any, without: Any, scale: Tensor | float, channels: int | None) -> Any:
    """e_u + w (e_c - e_u) of the first tensor that a model gives, or of its leading channels; the rest is e_c's."""
    leaves, form = pytree.tree_flatten(with_it)
    e, none = leaves[0], pytree.tree_flatten(without)[0][0]
    w = scale.to(e.dtype).view(-1, *[1] * (e.ndim - 1)) if isinstance(scale, Tensor) else scale
    if channels is None or channels >= e.shape[1]:
        moved = none + w * (e - none)
    else:
        head, plain = e[:, :channels], none[:, :channels]
        moved = torch.cat([plain + w * (head - plain), e[:, channels:]], dim=1)
    return pytree.tree_unflatten([moved, *leaves[1:]], form)
