"""Classifier-free guidance in one call: both rows of each sample run in one batch, and are combined inside.

Source: Ho and Salimans 2022, arXiv:2207.12598, equation 6, written as e = e_u + w (e_c - e_u) with w = 1 + their w.
Departures: none for one output; where a model predicts a variance too, ``channels`` says how many leading channels are
guided, and the rest is that of the row with the condition. Of several networks those run both rows that the condition
reaches, directly or by what others give; each of the two has state tensors of its own (``passes/kernel/twofold.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import INDEPENDENT_ROWS, SINGLE_ROWS, UNBLENDED_ATTENTION, Fact
from enginewright.ground.program import Program
from enginewright.passes.contract import Context, Decision, Facts, Inputs, Json, NewInput, Pass, Plan
from enginewright.passes.kernel.roles import input_of
from enginewright.passes.kernel.rows import Repeating, shared_inputs, two_of_each
from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.twofold import ALONE, Twofold, twofold
from enginewright.passes.kernel.wrap import Call, wrap
from enginewright.passes.networks import called_by, each_network, program_of, taking

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
    requires: ClassVar[tuple[Fact, ...]] = (SINGLE_ROWS, UNBLENDED_ATTENTION, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (SINGLE_ROWS,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (GuidedRows,)
    facts: ClassVar[type[Facts]] = Facts

    condition: str = Field(default="", description="input that carries the condition; empty: the one of that role")
    none: Any = Field(default=None, description="its value for no condition: a number, or lists of what a row has")
    scale: float = Field(default=4.0, description="w; what the input guidance_scale is where a call leaves it out")
    fixed: bool = Field(default=False, description="bake the scale in, instead of an input guidance_scale (batch)")
    channels: int | None = Field(
        default=None, ge=1, description="leading channels of the output that are guided; left out: all"
    )

    def plan(self, model: nn.Module, context: Context) -> Plan[GuidedRows]:
        """Check what was asked.

        Raises ``ToolchainError`` for an unknown condition, a value that does not fit it, or one that decides nothing.
        """
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
        guided_networks(program_of(model), condition)
        shared = shared_inputs(context, example, like=condition)
        how = GuidedRows(condition=condition, none=self.none, channels=self.channels, shared=shared)
        return Plan(choice={"": how})

    def rewrite(self, model: nn.Module, plan: Plan[GuidedRows]) -> nn.Module:
        """Let each call run both rows at once; paths of modules stay as they were."""
        how = plan.choice[""]
        parts, program = guided_networks(program_of(model), how.condition)

        def change(network: nn.Module, name: str) -> nn.Module:
            if name not in parts:
                return network
            # A network that takes all of a call is given the scale too, though another may be the one to use it.
            given = not self.fixed and (parts[name].ends or program.networks[name].takes is None)
            wrap(network, Guided(how=how, scale=self.scale, fixed=not given, part=parts[name], copies=2))
            return network

        ends = [] if self.fixed else [name for name, part in parts.items() if part.ends]
        return called_by(each_network(model, change), taking(program, dict.fromkeys(ends, (SCALE,))))

    def new_inputs(self, plan: Plan) -> tuple[NewInput, ...]:
        """The scale, if it is not baked in."""
        return () if self.fixed else (NewInput(name=SCALE, default=self.scale),)

    def intended(self, model: nn.Module, plan: Plan[GuidedRows], context: Context) -> nn.Module:
        """Two calls of the original; one of twice the rows where it keeps a state, so that each row has its own."""
        model = share(model)
        copies = 2 if program_of(model).states else 1
        wrap(model, Guided(how=plan.choice[""], scale=self.scale, fixed=self.fixed, copies=copies))
        return model


def guided_networks(program: Program, condition: str) -> tuple[dict[str, Twofold], Program]:
    """The networks that a condition reaches, and how they are then called. Raises as ``twofold`` does."""
    taking_it = [name for name, own in program.networks.items() if own.takes is None or condition in own.takes]
    return twofold(program, taking_it, what=f"the condition {condition}")


@dataclass(frozen=True, kw_only=True)
class Guided(Repeating):
    """A model called with and without its condition.

    Args:
        how: as the plan has it.
        scale: w where a call says nothing.
        fixed: whether a call cannot.
        part: of several networks, what comes to this one for both and what it gives.
        copies: 2: both in one call, the rows of one after those of the other; 1: in two calls.
    """

    how: GuidedRows
    scale: float
    fixed: bool
    part: Twofold = ALONE

    @property
    def adds(self) -> tuple[str, ...]:
        """The scale, unless it is fixed."""
        return () if self.fixed else (SCALE,)

    def answer(self, forward: Call, inputs: dict[str, Any]) -> Any:
        """Answer a call."""
        given, how, part = inputs.pop(SCALE, None), self.how, self.part
        scale = self.scale if given is None else given

        def together(with_it: Any, without: Any) -> Any:
            return combined(with_it, without, scale, how.channels)

        none: Inputs = {}
        if how.condition in inputs:  # else only what other networks give depends on it
            condition: Tensor = inputs[how.condition]
            row = torch.tensor(how.none, dtype=condition.dtype, device=condition.device)
            none[how.condition] = row.expand_as(condition)
        if self.copies == 1:
            return together(forward(**inputs), forward(**{**inputs, **none}))
        twice: Inputs = two_of_each(inputs, (*how.shared, *part.shared, *part.both)) | part.rows(inputs)
        twice |= {name: torch.cat([inputs[name], row]) for name, row in none.items()}
        leaves, form = pytree.tree_flatten(forward(**twice))
        # Not ``chunk``, which rounds: what it asks of an open number of rows the exporter cannot prove.
        halves = [leaf.unflatten(0, (2, -1)).unbind(0) for leaf in leaves]
        with_it, without = (pytree.tree_unflatten([half[i] for half in halves], form) for i in (0, 1))
        return part.answer(with_it, without, together)


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
