"""Blocks that drop tokens: by the attention that they get, or by an interpreter's scores.

Shapes: B batch, n tokens now, m that stay, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.passes.contract import Decision, Inputs
from enginewright.passes.kernel.observe import Look, looking
from enginewright.passes.tokens.interpreter import Interpreter
from enginewright.passes.tokens.matching import ascending
from enginewright.passes.tokens.running import Step, TokenRun, Tokens, joined
from enginewright.passes.traits import TokenBlock


class Border(Decision):
    """A block in or before which tokens are dropped."""

    arrays: ClassVar[Mapping[str, str]] = {
        ".interpreter.weight": "of the layer that scores tokens, for method = policy",
        ".interpreter.bias": "of that layer",
    }


class KeptShare(Border):
    """A border at which a share of the tokens stays."""

    keep: float = Field(description="share that stays of the tokens there, leading ones apart")


class KeptCount(Border):
    """A border at which a number of tokens stays."""

    count: int = Field(description="tokens that stay, leading ones apart")


Kept = KeptShare | KeptCount


def whole(kept: Kept, tokens: int, *, up: bool) -> int:
    """How many of so many tokens stay: a share is rounded up or down, and at least 1 stays of
    those that there are.

    Counted as those that go, so that where the number is known only when the graph runs, it is seen never to rise.
    """
    if isinstance(kept, KeptCount):
        return min(kept.count, tokens)
    gone = 1 - Fraction(kept.keep).limit_denominator(10_000)
    left = tokens - (tokens * gone.numerator + (0 if up else gone.denominator - 1)) // gone.denominator
    return max(left, min(tokens, 1)) if isinstance(left, int) else left


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Attention (B, H, queries, n) of queries and keys (B, H, n, head_dim)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def received(attention: Tensor, mask: Tensor | None) -> Tensor:
    """Mean attention (B, H, n) that each token receives, (B, H, n, n), from queries that are no padding."""
    if mask is None:
        return attention.mean(dim=2)
    real = (mask >= 0).to(attention).transpose(-1, -2)  # (B, 1, n, 1)
    return (attention * real).sum(dim=2) / real.sum(dim=2)


def best(scores: Tensor, count: int, leading: int) -> Tensor:
    """The leading tokens, and the ``count`` others of the highest scores (B, n) -> ascending (B, leading + count)."""
    # As one selection: a graph of any length must not ask whether a part of it is a single token.
    first = torch.full_like(scores[:, :leading], float("inf"))
    return ascending(torch.cat([first, scores[:, leading:]], dim=1).topk(leading + count).indices)


class DropStep(Step):
    """One block that drops tokens between its halves, by the attention of its own.

    Args:
        block: the block.
        kind: how a call of it is taken apart.
        kept: how many tokens stay.
        leading: tokens at the front that stay anyway.
        received: score by the mean attention that a token receives, not by the class token's.
        fuse: add one token, the sum of those dropped, weighted by their scores.
    """

    def __init__(
        self, block: nn.Module, kind: type[TokenBlock], *, kept: Kept, leading: int, received: bool, fuse: bool
    ) -> None:
        super().__init__(block, kind)
        self.kept, self.leading, self.received, self.fuse = kept, leading, received, fuse

    def forward(self, tokens: Tokens, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Attention, drop, feed-forward."""
        call = self.kind(self.block, *inputs, **named)
        q, k, v = call.heads(call.attention_input(tokens.x))
        if self.received:
            attention = probabilities(q, k, tokens.mask)
            tokens.x = call.add_attention(tokens.x, call.output(joined(attention @ v)))
            scores = received(attention, tokens.mask).mean(dim=1)  # (B, n)
        else:
            self.attend(tokens, call, q, k, v)
            scores = probabilities(q[:, :, :1], k, tokens.mask).mean(dim=1)[:, 0]
        self.drop(tokens, scores)
        self.feed(tokens, call)

    def drop(self, tokens: Tokens, scores: Tensor) -> None:
        """Keep the best (scores (B, n)), and one token for the rest where that is asked for."""
        count = whole(self.kept, tokens.x.shape[1] - self.leading, up=True)
        stay, before = best(scores, count, self.leading), tokens.x
        tokens.keep(stay)
        if self.fuse:
            weight = scores.scatter(1, stay, torch.zeros_like(stay).to(scores))  # (B, n)
            tokens.add(weight[:, None] @ before)


class PolicyStep(Step):
    """One block before which tokens are dropped by an interpreter's scores.

    While it trains, or ``learns``, tokens that stay pass a gate that is 1 and has the scores' gradient
    (straight-through; ours, in the place of the paper's policy gradient).
    """

    def __init__(
        self, block: nn.Module, kind: type[TokenBlock], interpreter: Interpreter, *, kept: Kept, leading: int
    ) -> None:
        super().__init__(block, kind)
        self.interpreter, self.kept, self.leading = interpreter.train(block.training), kept, leading
        self.learns = False

    def forward(self, tokens: Tokens, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Drop, then the block."""
        scores = self.interpreter(tokens.x)
        if self.learns or self.training:
            gate = (1 + (scores - scores.detach()))[..., None]  # 1 to the last bit
            tokens.x = torch.cat([tokens.x[:, : self.leading], (tokens.x * gate)[:, self.leading :]], dim=1)
        count = whole(self.kept, tokens.x.shape[1] - self.leading, up=False)
        if tokens.mask is not None:
            scores = scores + tokens.mask[:, 0, 0].clamp(min=-1)  # padding goes first
        tokens.keep(best(scores, count, self.leading))
        super().forward(tokens, inputs, named)


def keep_maps(model: nn.Module, inputs: Inputs) -> Tensor:
    """Which tokens of the start (B, borders, N) are left after each border, leading ones included, in one call."""
    maps: list[Tensor] = []
    runs = [module for module in model.modules() if isinstance(module, TokenRun)]
    borders = [step for run in runs for step in run.steps if isinstance(step, (DropStep, PolicyStep))]

    def note(inputs: tuple[Tokens, ...], named: Mapping[str, Any], output: None) -> None:
        maps.append(inputs[0].place >= 0)

    with torch.no_grad(), looking(Look(step, after=note) for step in borders):
        model(**inputs)
    return torch.stack(maps, dim=1)
