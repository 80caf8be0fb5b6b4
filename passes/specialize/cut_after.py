"""End a model's stack of blocks early: an encoder whose hidden states are read before its last block needs no more.

Ours. ``layer`` counts as ``hidden_states`` of transformers does: entry k is what block k gives, counted from 1, and
entry 0 what goes into the first; the norm after the last block is not in them. Heads after the stack (a pooler) stay
and read the earlier state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from enginewright.ground.errors import ToolchainError, unknown
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan, counted
from enginewright.passes.kernel.observe import Look, looking
from enginewright.passes.kernel.stacks import stacks_of
from enginewright.passes.kernel.surgery import share
from enginewright.passes.traits import BlockStack, layer_at


class CutStack(Decision):
    """A stack that ends early."""

    kept: int = Field(description="blocks that stay, from the first")
    of: int = Field(description="blocks that the stack has")


class DroppedNorm(Decision):
    """A norm behind the stack that goes."""

    dropped: Literal[True] = Field(description="it gives what it is given")


class CutFacts(Facts):
    """What was asked of the norm behind the last block."""

    final_norm: str = Field(description="whether it stays")


class CutAfter(Pass):
    """Leave out every block after the one whose result is used."""

    intends: ClassVar[str] = "the original up to a layer"
    by_layer: ClassVar[bool] = False
    decisions: ClassVar[tuple[type[Decision], ...]] = (CutStack, DroppedNorm)
    facts: ClassVar[type[Facts]] = CutFacts

    layer: int = Field(default=-2, description="last state used, as an index of hidden_states; -2 is one block early")
    final_norm: Literal["keep", "drop"] = Field(
        default="drop", description="the norm after the stack; hidden_states[layer] is before it"
    )
    stack: str = Field(default="", description="module path of the stack; needed where there are several")

    def plan(self, model: nn.Module, context: Context) -> Plan[CutStack | DroppedNorm]:
        """Find the stack, the blocks to leave out, and the norm after it.

        Raises ``ToolchainError`` for no stack or several without a name, a layer that the stack has not or that needs
        no block at all, and where there is no call to find the norm with.
        """
        path, found = self.find(model)
        count = len(found.blocks)
        kept = self.kept(count)
        if not 1 <= kept <= count:
            raise ToolchainError(f"layer is {self.layer}; the stack has blocks 1 to {count}", where=path)
        if needed := [i for i in found.fixed if i >= kept]:
            raise ToolchainError(f"block {needed[0] + 1} must stay: {found.fixed[needed[0]]}", where=path)
        if kept == count and self.final_norm == "keep":
            return Plan(choice={}, skipped={path: f"state {self.layer} is what its last block gives"})
        choice: dict[str, CutStack | DroppedNorm] = {path: CutStack(kept=kept, of=count)}
        if self.final_norm == "drop" and (norm := norm_after(model, found, context)):
            choice[norm] = DroppedNorm(dropped=True)
        plan = Plan(choice=choice, facts=CutFacts(final_norm=self.final_norm))
        self.refuse_uncallable(model, plan, context)
        return plan

    def refuse_uncallable(self, model: nn.Module, plan: Plan[CutStack | DroppedNorm], context: Context) -> None:
        """Raise where a model reads what goes in other ways than by calling it, such as a norm's own weights."""
        example = next(iter(context.calibration), context.example)
        if example is None:
            return
        cut = self.rewrite(share(model), plan)
        try:
            counted(cut, example)
        except Exception as cause:  # whatever a model's own code raises
            said = f"{type(cause).__name__}: {cause}".splitlines()[0]
            norms = [path for path, each in plan.choice.items() if isinstance(each, DroppedNorm)]
            raise ToolchainError(
                f"the model cannot be called any more when it is cut: {said}",
                where=next(iter(plan.choice)),
                help=f"the norm {norms[0]!r} goes too: try final_norm = 'keep'" if norms else None,
            ) from cause

    def rewrite(self, model: nn.Module, plan: Plan[CutStack | DroppedNorm]) -> nn.Module:
        """Cut, in place. Raises ``ToolchainError`` when the stack has not the blocks of the plan."""
        for path, cut in plan.choice.items():
            if isinstance(cut, DroppedNorm):
                model.set_submodule(path, nn.Identity())
                continue
            found = layer_at(model, path, BlockStack)
            if len(found.blocks) != cut.of:
                raise ToolchainError(
                    f"the plan is for a stack of {cut.of} blocks; this one has {len(found.blocks)}", where=path
                )
            found.keep_blocks(range(cut.kept))
        return model

    def intended(self, model: nn.Module, plan: Plan[CutStack | DroppedNorm], context: Context) -> nn.Module:
        """The original, cut: what is compared is what other steps and engines add to that.

        Where steps before took blocks out, ``layer`` counts among the original's own, as it does in hidden_states.
        """
        choice = dict(plan.choice)
        for path, cut in plan.choice.items():
            if isinstance(cut, CutStack):
                count = len(layer_at(model, path, BlockStack).blocks)
                choice[path] = CutStack(kept=min(max(self.kept(count), 1), count), of=count)
        return self.rewrite(share(model), replace(plan, choice=choice))

    def kept(self, count: int) -> int:
        """How many of a stack's blocks are needed."""
        return self.layer if self.layer >= 0 else count + 1 + self.layer

    def find(self, model: nn.Module) -> tuple[str, BlockStack]:
        """The stack that is meant, and its path."""
        stacks, others = stacks_of(model)
        if self.stack:
            if self.stack not in stacks:
                raise unknown("stack of blocks", self.stack, stacks)
            return self.stack, stacks[self.stack]
        if len(stacks) != 1:
            changed = "; ".join(f"{path!r}: {reason}" for path, reason in others.items())
            listed = ", ".join(stacks) or changed or "none that a family knows"
            raise ToolchainError(f"which stack is to be cut? There are {len(stacks)}: {listed}", help="name it: stack")
        return next(iter(stacks.items()))


def norm_after(model: nn.Module, stack: BlockStack, context: Context) -> str:
    """Path of the norm that reads what the last block gives, seen from one call; empty where none does."""
    example = next(iter(context.calibration), context.example)
    if not example:
        raise ToolchainError("final_norm = 'drop' follows one call of the model and got none")
    with torch.no_grad(), watching(model, stack) as norms:
        model(**example)
    return norms[0] if norms else ""


@contextmanager
def watching(model: nn.Module, stack: BlockStack) -> Iterator[list[str]]:
    """Paths of norms outside the stack, in the order in which they read the last block's result."""
    given: list[Tensor] = []
    norms: list[str] = []

    def last(args: Any, named: Any, result: Any) -> None:
        given[:] = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    def look(path: str, args: tuple[Any, ...], named: Any) -> None:
        if any(arg is tensor for arg in args for tensor in given):
            norms.append(path)

    inside = {module for block in stack.blocks for module in block.modules()}
    looks = [Look(stack.blocks[-1], after=last)]
    looks += [
        Look(module, before=partial(look, path))
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and module not in inside
    ]
    with looking(looks):
        yield norms
