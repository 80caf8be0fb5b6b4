"""Two forms of a network: one that also gives what some of its blocks add to the stream, and one that takes that.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from enginewright.passes.kernel.wrap import AroundByName, Call, wrap
from enginewright.passes.traits import BlockStack, layer_at

REUSED = "reused"
"""What the whole network gives beside its output, and the shortened one takes beside its inputs."""


NO_STACK = "reuse_blocks runs some of its blocks at some steps only; what takes blocks out goes before it"
"""Why a list with blocks of these forms is no stack any more."""


@dataclass
class Now:
    """The stream before the blocks, and what they add to it, each (B, N, D), while a call is made."""

    before: Tensor | None = None
    added: Tensor | None = None

    def clear(self) -> None:
        """Let go of both."""
        self.before = self.added = None


class Watched(nn.Module):
    """A block that runs, and notes the stream before the first, and what has been added after the last."""

    why_no_stack: ClassVar[str] = NO_STACK

    def __init__(self, block: nn.Module, now: Now, *, first: bool, last: bool) -> None:
        super().__init__()
        self.block, self.now, self.first, self.last = block, now, first, last
        self.training = block.training

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """What the block gives."""
        if self.first:
            self.now.before = stream(inputs, named)
        output: Tensor = self.block(*inputs, **named)
        if self.last:
            assert self.now.before is not None
            self.now.added = output - self.now.before
        return output


class LeftOut(nn.Module):
    """Called as a block is; the first of those left out adds what all of them added before."""

    why_no_stack: ClassVar[str] = NO_STACK

    def __init__(self, now: Now, *, first: bool) -> None:
        super().__init__()
        self.now, self.first = now, first

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The stream."""
        x = stream(inputs, named)
        if not self.first:
            return x
        return x + (torch.zeros_like(x) if self.now.added is None else self.now.added)


def stream(inputs: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """The tokens that a block is called with."""
    found: Tensor = named["hidden_states"] if "hidden_states" in named else inputs[0]
    return found


def giving(model: nn.Module, path: str, blocks: Sequence[int]) -> nn.Module:
    """Let a model, in place, give (what it gave, what these blocks of a stack add)."""
    stack, now = layer_at(model, path, BlockStack).blocks, Now()
    for number in blocks:
        stack[number] = Watched(stack[number], now, first=number == blocks[0], last=number == blocks[-1])
    wrap(model, Giving(now))
    return model


def taking(model: nn.Module, path: str, blocks: Sequence[int]) -> nn.Module:
    """Leave these blocks of a stack out of a model, in place; it takes ``reused`` (B, N, D), or adds nothing."""
    stack, now = layer_at(model, path, BlockStack).blocks, Now()
    for number in blocks:
        stack[number] = LeftOut(now, first=number == blocks[0]).train(stack.training)
    wrap(model, Taking(now))
    return model


@dataclass(frozen=True)
class Giving(AroundByName):
    """A model that also gives what its watched blocks added."""

    now: Now

    def answer(self, forward: Call, inputs: dict[str, Any]) -> Any:
        """What the model gives, and what was added."""
        try:
            return forward(**inputs), self.now.added
        finally:
            self.now.clear()


@dataclass(frozen=True)
class Taking(AroundByName):
    """A model that also takes what is to be added in the place of the blocks left out."""

    now: Now

    @property
    def adds(self) -> tuple[str, ...]:
        """What is to be added."""
        return (REUSED,)

    def answer(self, forward: Call, inputs: dict[str, Any]) -> Any:
        """What the model gives."""
        self.now.added = inputs.pop(REUSED, None)
        try:
            return forward(**inputs)
        finally:
            self.now.clear()
