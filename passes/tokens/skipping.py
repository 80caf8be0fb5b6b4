"""Blocks whose feed-forward runs on the tokens that a router picks, and routers fitted to what feed-forwards do.

Shapes: B batch, N tokens, m that are picked, D width, S samples (tokens of all calls).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import observe
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.dropping import best
from enginewright.passes.tokens.interpreter import Fit, Interpreter
from enginewright.passes.tokens.matching import rows
from enginewright.passes.tokens.running import Found, Step, TokenRun, Tokens, stack_at
from enginewright.passes.traits import TokenBlock


class SkipStep(Step):
    """One block whose feed-forward runs on ``count`` content tokens of each sample, and on the leading ones.

    While it trains, or ``learns``, what it gives passes a gate that is 1 and has the router's gradient
    (straight-through). A router of the block's own also shuts out those of the ``count`` that it lets not run, as
    ``add_feed_forward`` does.

    Args:
        block: the block.
        kind: how a call of it is taken apart.
        router: scores each token, with one head; None: the block's own does.
        count: how many run,
        of: of so many content tokens; of more or fewer as large a share does, counted as those that do not run.
        leading: tokens at the front that run anyway.
    """

    def __init__(
        self, block: nn.Module, kind: type[TokenBlock], router: Interpreter | None, *, count: int, of: int, leading: int
    ) -> None:
        super().__init__(block, kind)
        self.router = None if router is None else router.train(block.training)
        self.count, self.of, self.leading = count, of, leading
        self.learns = False

    def feed(self, tokens: Tokens, call: TokenBlock) -> None:
        """Gather, feed-forward, and the tokens that ran back in their places."""
        x = tokens.x
        scores = call.token_logits(x) if self.router is None else self.router.products(x)[..., 0]  # (B, N)
        content = x.shape[1] - call.ahead - self.leading
        count = content - content * (self.of - self.count) // self.of
        picked = best(scores, count, call.ahead + self.leading)
        run = rows(x, picked)  # (B, m, D)
        y = call.feed_forward(
            rows(call.feed_forward_input(x), picked) if call.parallel else call.feed_forward_input(run)
        )
        if self.router is not None and (self.learns or self.training):
            gate = rows(scores.sigmoid()[..., None], picked)
            y = y * (1 + (gate - gate.detach()))  # 1 to the last bit
        if call.parallel:  # the projection reads both halves, of every token
            idle = y.new_zeros(()).expand(*x.shape[:2], y.shape[-1])
            tokens.x = call.add_feed_forward(x, put_back(idle, y, picked))
        else:
            tokens.x = put_back(x, call.add_feed_forward(run, y), picked)


def put_back(x: Tensor, run: Tensor, picked: Tensor) -> Tensor:
    """Tokens (B, N, D), those at ascending indices (B, m) replaced by others (B, m, D), as one gather."""
    count = x.shape[1]
    places = torch.arange(count, device=x.device)
    ran = (picked[..., None] == places).any(dim=1)  # (B, N)
    return rows(torch.cat([x, run], dim=1), torch.where(ran, ran.long().cumsum(1) - 1 + count, places))


class Count(Step):
    """One block that tells on how many content tokens of each sample its own router lets the feed-forward run."""

    def __init__(self, block: nn.Module, kind: type[TokenBlock], seen: list[Tensor], *, leading: int) -> None:
        super().__init__(block, kind)
        self.seen, self.leading = seen, leading

    def feed(self, tokens: Tokens, call: TokenBlock) -> None:
        """Count, then the feed-forward."""
        logits = call.token_logits(tokens.x)[:, call.ahead + self.leading :]
        self.seen.append((logits > 0).sum(dim=1))
        super().feed(tokens, call)


def counted(model: nn.Module, stacks: Sequence[Found], context: Context) -> dict[str, Tensor]:
    """On how many tokens each block of stacks that bring routers runs, by path, for each calibration sample.

    A block that the inputs never reach has none.
    """
    seen: dict[str, list[Tensor]] = {}
    twin = share(model)
    for found in stacks:
        stack = stack_at(twin, found.path)
        steps = [
            Count(block, stack.block, seen.setdefault(found.block(number), []), leading=stack.leading)
            for number, block in enumerate(stack.blocks)
        ]
        stack.replace_blocks(TokenRun(steps, restore=False))
    if stacks:
        observe(twin, (), context, doing="counting the tokens that run")
    return {path: torch.cat(own) for path, own in seen.items() if own}


See = Callable[[Tensor, Tensor], None]
"""Called with a feed-forward's content tokens (B, N, D) and how far it moves each (B, N)."""


class Watch(Step):
    """One block that tells what its feed-forward does to its content tokens."""

    def __init__(self, block: nn.Module, kind: type[TokenBlock], see: See, *, leading: int) -> None:
        super().__init__(block, kind)
        self.see, self.leading = see, leading

    def feed(self, tokens: Tokens, call: TokenBlock) -> None:
        """The feed-forward, and the norm of its change over that of the token."""
        before = tokens.x
        y = call.feed_forward(call.feed_forward_input(before))
        tokens.x = call.add_feed_forward(before, y)
        still = call.add_feed_forward(before, torch.zeros_like(y)) if call.parallel else before
        change = torch.linalg.vector_norm(tokens.x - still, dim=-1) / torch.linalg.vector_norm(before, dim=-1)
        content = slice(call.ahead + self.leading, None)
        self.see(before[:, content], change[:, content])


def watch(model: nn.Module, found: Found, context: Context, see: Mapping[int, See]) -> None:
    """Make the calibration calls, and have the feed-forwards of some blocks seen; the model stays as it was."""
    twin = share(model)
    stack = stack_at(twin, found.path)
    stack.replace_blocks(
        TokenRun(
            [
                Watch(block, stack.block, see[number], leading=stack.leading)
                if number in see
                else Step(block, stack.block)
                for number, block in enumerate(stack.blocks)
            ],
            restore=False,
        )
    )
    observe(twin, (), context, doing="watching feed-forwards")


@dataclass(frozen=True, kw_only=True)
class Router:
    """What picks the tokens that a feed-forward runs on: weight (1, D), bias (1,), and how well it does."""

    weight: Tensor
    bias: Tensor
    facts: dict[str, float]


def fitted(model: nn.Module, found: Found, counts: Mapping[int, int], context: Context) -> dict[int, Router]:
    """A router for each of some blocks, by number, from what they do to the calibration inputs.

    Least squares towards the logarithm of each token's move, both over their means in the sample, because tokens are
    picked among those of one sample. The bias puts 0.5 where as large a share of all tokens is above it. A block that
    the inputs never reach has none.

    Args:
        model: stays as it was.
        found: the stack.
        counts: for each block how many content tokens of a sample it is to run.
        context: has the calibration calls, which are made twice, so that no tokens need be kept.

    Raises:
        ToolchainError: values are not finite.
    """
    fits = {number: Fit() for number in counts}

    def learning(fit: Fit) -> See:
        def see(x: Tensor, moved: Tensor) -> None:
            level = moved.clamp(min=1e-6).log()
            target = (level - level.mean(dim=1, keepdim=True)).exp()
            centred = x - x.mean(dim=1, keepdim=True)
            fit.add(centred.flatten(0, 1), target.flatten()[:, None])

        return see

    watch(model, found, context, {number: learning(fit) for number, fit in fits.items()})
    weights: dict[int, Tensor] = {}
    for number, fit in fits.items():
        if not fit.tokens:
            continue
        if not (torch.isfinite(fit.square).all() and torch.isfinite(fit.cross).all()):
            what = "what its feed-forward does to the calibration inputs is not finite"
            raise ToolchainError(what, where=found.block(number))
        weights[number], _ = fit.solved()
    judged: dict[int, Judged] = {number: Judged(weight) for number, weight in weights.items()}
    watch(model, found, context, {number: each.see for number, each in judged.items()})
    return {number: each.router(counts[number]) for number, each in judged.items()}


class Judged:
    """How a router's logits rank the tokens of each sample, beside how far each is moved: two numbers a token."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.logits: list[Tensor] = []
        self.moved: list[Tensor] = []

    def see(self, x: Tensor, moved: Tensor) -> None:
        """Tokens (B, N, D) and their moves (B, N) of one call."""
        self.logits.append((x.double() @ self.weight.double().T)[..., 0])
        self.moved.append(moved)

    def router(self, count: int) -> Router:
        """The router, with the bias that picks as large a share of tokens; so many of a sample's tokens run."""
        logits, moved = torch.cat(self.logits), torch.cat(self.moved)  # (B, N)
        share = 1 - count / logits.shape[1]
        bias = -torch.quantile(logits.flatten()[: 2**24], share)
        above = (logits + bias > 0).sum(dim=1)
        power = moved.double().square()
        picked = power.gather(1, logits.topk(count).indices).sum() / power.sum().clamp(min=1e-30)
        ideal = power.topk(count).values.sum() / power.sum().clamp(min=1e-30)
        facts = {
            "moves_kept": float(picked),
            "moves_kept_at_best": float(ideal),
            "samples_with_more_above_half": float((above > count).double().mean()),
        }
        return Router(
            weight=self.weight,
            bias=bias.float()[None],
            facts={name: six_digits(value) for name, value in facts.items()},
        )
