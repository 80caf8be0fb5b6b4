"""A start for IA-RED2's interpreters from calibration inputs, and how many tokens each of them would keep.

Shapes: B batch, N tokens (leading ones apart), H heads, D width, S samples (tokens of all calls).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.kernel.observe import observe
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.dropping import probabilities, received
from enginewright.passes.tokens.interpreter import Fit, interpreter
from enginewright.passes.tokens.running import Found, Step, TokenRun, Tokens, stack_at
from enginewright.passes.traits import TokenBlock

See = Callable[[Tensor, Tensor, Tensor], None]
"""Called with the tokens at a border (B, N, D), the attention that they get up to the next (B, N, H), and which of them
are real (B, N)."""


class Group:
    """What is seen of the blocks from one border to the next, one call after the other; it keeps nothing of a call.

    Args:
        blocks: how many there are.
        see: called when the last of them has run.
    """

    def __init__(self, blocks: int, see: See) -> None:
        self.blocks, self.see = blocks, see
        self.seen: list[Tensor] = []
        self.start: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, got: Tensor, real: Tensor) -> None:
        """One block's tokens, the attention that they get in it, and which are real."""
        self.start = self.start or (x, real)
        self.seen.append(got)
        if len(self.seen) == self.blocks:
            (x, real), attention = self.start, torch.stack(self.seen).sum(dim=0)
            self.seen, self.start = [], None
            self.see(x, attention, real)


class Watch(Step):
    """One block that tells a group of its input and of the attention that each token gets in it."""

    def __init__(self, block: nn.Module, kind: type[TokenBlock], group: Group, *, by_class: bool, leading: int) -> None:
        super().__init__(block, kind)
        self.group, self.by_class, self.leading = group, by_class, leading

    def forward(self, tokens: Tokens, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Tell, then the block."""
        call = self.kind(self.block, *inputs, **named)
        q, k, _ = call.heads(call.attention_input(tokens.x))
        if self.by_class:
            got = probabilities(q[:, :, :1], k, tokens.mask)[:, :, 0]  # (B, H, N)
        else:
            got = received(probabilities(q, k, tokens.mask), tokens.mask)
        mask, content = tokens.mask, slice(self.leading, None)
        real = torch.ones_like(tokens.x[:, :, 0]) if mask is None else (mask[:, 0, 0] >= 0).to(tokens.x)
        real = real.expand(tokens.x.shape[:2])[:, content] > 0
        self.group.add(tokens.x[:, content], got.transpose(1, 2)[:, content], real)
        super().forward(tokens, inputs, named)


def watch(model: nn.Module, found: Found, borders: Sequence[int], context: Context, see: Sequence[See]) -> None:
    """Make the calibration calls, and have each group of blocks behind a border seen; the model stays as it was."""
    twin = share(model)
    stack = stack_at(twin, found.path)
    by_class = stack.leading > 0 and not stack.padded
    ends = (*borders[1:], len(stack.blocks))
    groups = [Group(end - border, each) for border, end, each in zip(borders, ends, see, strict=True)]
    steps = [Step(block, stack.block) for block in stack.blocks[: borders[0]]]
    for group, border, end in zip(groups, borders, ends, strict=True):
        steps += [
            Watch(block, stack.block, group, by_class=by_class, leading=stack.leading)
            for block in stack.blocks[border:end]
        ]
    stack.replace_blocks(TokenRun(steps, restore=True))
    observe(twin, (), context, doing="watching attention")


def fitted(model: nn.Module, found: Found, borders: Sequence[int], context: Context) -> dict[str, Tensor]:
    """Weights and biases of an interpreter before each border.

    A border's target is the attention over the blocks up to the next border.

    Raises:
        ToolchainError: the calibration calls never reach the blocks.
    """
    fits = [Fit() for _ in borders]

    def learning(fit: Fit) -> See:
        return lambda x, attention, real: fit.add(x[real], over_mean(attention, real)[real])

    watch(model, found, borders, context, [learning(fit) for fit in fits])
    if not all(fit.tokens for fit in fits):
        raise ToolchainError("the calibration calls never reach these blocks", where=found.path)
    arrays: dict[str, Tensor] = {}
    for border, fit in zip(borders, fits, strict=True):
        weight, bias = fit.solved()
        path = f"{found.block(border)}.interpreter"
        arrays |= {f"{path}.weight": weight, f"{path}.bias": bias}
    return arrays


def counted(
    model: nn.Module,
    found: Found,
    borders: Sequence[int],
    context: Context,
    arrays: Mapping[str, Tensor],
    *,
    quantile: float,
) -> list[int]:
    """How many tokens each border keeps: those that it and all before it score above 0.5, on the untouched model.

    Args:
        model: stays as it was.
        found: the stack.
        borders: block numbers.
        context: has the calibration calls.
        arrays: weights and biases of the interpreters.
        quantile: of the counts of all pictures.

    Raises:
        ToolchainError: the calibration calls never reach the blocks.
    """
    needed: list[list[Tensor]] = [[] for _ in borders]
    left: list[Tensor] = []

    def counting(number: int) -> See:
        path = f"{found.block(borders[number])}.interpreter"

        def see(x: Tensor, attention: Tensor, real: Tensor) -> None:
            judge = interpreter(arrays[f"{path}.weight"], arrays[f"{path}.bias"], x)
            left[:] = [(left[0] if number else real) & (judge(x) > 0.5)]
            needed[number].append(left[0].sum(dim=1))

        return see

    watch(model, found, borders, context, [counting(number) for number in range(len(borders))])
    if not all(needed):
        raise ToolchainError("the calibration calls never reach these blocks", where=found.path)
    counts = [torch.quantile(torch.cat(each).float(), quantile, interpolation="higher") for each in needed]
    return [max(int(count), 1) for count in counts]


def over_mean(attention: Tensor, real: Tensor) -> Tensor:
    """Attention (B, N, H) over its mean among the real tokens (B, N)."""
    weight = real[..., None].to(attention)
    return attention / ((attention * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True))
