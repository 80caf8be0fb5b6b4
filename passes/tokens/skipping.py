"""Blocks whose feed-forward runs on the tokens that a router picks, and routers fitted to what feed-forwards do.

Shapes: B batch, N tokens, m that are picked, D width, S samples (tokens of all calls).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import observe
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.dropping import best
from enginewright.passes.tokens.interpreter import Interpreter, fit
from enginewright.passes.tokens.matching import rows
from enginewright.passes.tokens.running import Found, Step, TokenRun, Tokens, stack_at
from enginewright.passes.traits import TokenBlock


class SkipStep(Step):
    """One block whose feed-forward runs on ``count`` content tokens of each sample, and on the leading ones.

    While it trains, or ``learns``, what it gives passes a gate that is 1 and has the router's gradient
    (straight-through).

    Args:
        block: the block.
        kind: how a call of it is taken apart.
        router: scores each token, with one head.
        count: how many run,
        of: of so many content tokens; of more or fewer as large a share does, counted as those that do not run.
        leading: tokens at the front that run anyway.
    """

    def __init__(
        self, block: nn.Module, kind: type[TokenBlock], router: Interpreter, *, count: int, of: int, leading: int
    ) -> None:
        super().__init__(block, kind)
        self.router, self.count, self.of, self.leading = router.train(block.training), count, of, leading
        self.learns = False

    def feed(self, tokens: Tokens, call: TokenBlock) -> None:
        """Gather, feed-forward, and the tokens that ran back in their places."""
        x = tokens.x
        scores = self.router.products(x)[..., 0]  # (B, N)
        content = x.shape[1] - call.ahead - self.leading
        count = content - content * (self.of - self.count) // self.of
        picked = best(scores, count, call.ahead + self.leading)
        run = rows(x, picked)  # (B, m, D)
        y = call.feed_forward(
            rows(call.feed_forward_input(x), picked) if call.parallel else call.feed_forward_input(run)
        )
        if self.learns or self.training:
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


class Watch(Step):
    """One block that notes its feed-forward's content tokens (B, N, D) and how far it moves each (B, N)."""

    def __init__(self, block: nn.Module, kind: type[TokenBlock], *, leading: int) -> None:
        super().__init__(block, kind)
        self.leading = leading
        self.inputs: list[Tensor] = []
        self.moved: list[Tensor] = []

    def feed(self, tokens: Tokens, call: TokenBlock) -> None:
        """The feed-forward, and the norm of its change over that of the token."""
        before = tokens.x
        y = call.feed_forward(call.feed_forward_input(before))
        tokens.x = call.add_feed_forward(before, y)
        still = call.add_feed_forward(before, torch.zeros_like(y)) if call.parallel else before
        change = torch.linalg.vector_norm(tokens.x - still, dim=-1) / torch.linalg.vector_norm(before, dim=-1)
        self.inputs.append(before[:, call.ahead + self.leading :])
        self.moved.append(change[:, call.ahead + self.leading :])


def watched(model: nn.Module, found: Found, context: Context) -> list[Watch]:
    """What each block of a stack did on the calibration inputs; the model stays as it was."""
    twin = share(model)
    stack = stack_at(twin, found.path)
    steps = [Watch(block, stack.block, leading=stack.leading) for block in stack.blocks]
    stack.replace_blocks(TokenRun(steps, restore=False))
    observe(twin, (), context, doing="watching feed-forwards")
    return steps


def fitted(step: Watch, count: int, *, where: str) -> tuple[Tensor, Tensor, dict[str, float]]:
    """A router from what a block did: weight (1, D), bias (1,), and how well it picks ``count`` of a sample's tokens.

    Least squares towards the logarithm of each token's move, both over their means in the sample, because tokens are
    picked among those of one sample. The bias puts 0.5 where as large a share of all tokens is above it.
    """
    x, moved = torch.cat(step.inputs), torch.cat(step.moved)  # (B, N, D), (B, N)
    if not (torch.isfinite(x).all() and torch.isfinite(moved).all()):
        raise ToolchainError("what its feed-forward does to the calibration inputs is not finite", where=where)
    level = moved.clamp(min=1e-6).log()
    target = (level - level.mean(dim=1, keepdim=True)).exp()
    centred = x - x.mean(dim=1, keepdim=True)
    weight, _ = fit(centred.flatten(0, 1), target.flatten()[:, None])
    logits = (x.double() @ weight.double().T)[..., 0]  # (B, N)
    share = 1 - count / x.shape[1]
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
    return weight, bias.float()[None], {name: six_digits(value) for name, value in facts.items()}
