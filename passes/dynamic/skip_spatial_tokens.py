"""Tokens of a picture that skip the feed-forward, chosen for each input by a router in every block.

Source: DyDiT (Zhao et al. 2024, arXiv:2410.03456), section 3.3, spatial-wise dynamic token: a router reads the tokens
after the attention's residual; those that it scores at most 0.5 skip the feed-forward and keep their residual, and
attention sees all. Departures: as many tokens of every picture pass, those of the highest scores, so that shapes are
fixed and time is saved; a router is one linear layer, not two, and comes without training from least squares towards
the logarithm of what the feed-forward changes in a token of the untouched model, over the token's norm, with its bias
such that 0.5 lets the asked share of the calibration tokens pass; leading tokens (class, distillation) always pass.
While the model trains, a score's gradient goes through the tokens that pass (straight-through), not by Gumbel noise.

Shapes: B batch, n tokens (leading ones included), N without them, k tokens that pass, D width, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from passes.contract import Context, Pass, Plan
from passes.selection import check_patterns, excluded_by
from passes.surgery import share
from passes.tokens.dropping import best, whole
from passes.tokens.interpreter import fit
from passes.tokens.matching import rows
from passes.tokens.running import SHORTENS, Found, Step, Tokens, blocks_of, replace_stacks, token_stacks
from passes.traits import TokenBlock, TokenStack
from toolchain.errors import ToolchainError


class SkipStep(Step):
    """One block whose feed-forward works on the tokens that its router scores highest, and on leading ones.

    Args:
        block: the block.
        kind: how a call of it is taken apart.
        router: tokens (B, n, D) -> logits (B, n, 1).
        ratio: of the tokens without leading ones that skip; rounded down.
        leading: tokens at the front that pass anyway.
    """

    def __init__(
        self, block: nn.Module, kind: type[TokenBlock], router: nn.Module, *, ratio: float, leading: int
    ) -> None:
        super().__init__(block, kind)
        self.router, self.ratio, self.leading = router.train(block.training), ratio, leading

    def feed(self, tokens: Tokens, call: TokenBlock) -> None:
        """The feed-forward of some; what it gives is zero for the others."""
        scores = self.router(tokens.x).squeeze(-1)  # (B, n)
        passing = best(scores, number_passing(self.ratio, scores.shape[1], self.leading), self.leading)
        y = call.feed_forward(rows(call.feed_forward_input(tokens.x), passing))  # (B, leading + k, D)
        if self.training:
            gate = scores.sigmoid().gather(1, passing)[..., None]
            y = y * (1 + (gate - gate.detach()))  # 1 to the last bit
        tokens.x = call.add_feed_forward(tokens.x, spread(y, passing, scores.shape[1]))


class WatchStep(Step):
    """One block that notes the tokens before its feed-forward, and how much that changes each of them."""

    def __init__(self, block: nn.Module, kind: type[TokenBlock], *, leading: int) -> None:
        super().__init__(block, kind)
        self.leading = leading
        self.seen: list[tuple[Tensor, Tensor]] = []

    def feed(self, tokens: Tokens, call: TokenBlock) -> None:
        """Note (tokens (B, N, D), relative change (B, N)), and feed."""
        before = tokens.x
        super().feed(tokens, call)
        change = (tokens.x - before).double().norm(dim=-1) / before.double().norm(dim=-1).clamp(min=1e-12)
        self.seen.append((before[:, self.leading :], change[:, self.leading :]))


def number_passing(ratio: float, tokens: int, leading: int) -> int:
    """How many of so many tokens pass beside the leading ones: at least 1."""
    return whole({"keep": 1 - ratio}, tokens - leading, up=True)


def spread(y: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Rows (B, m, D) at ascending places (B, m) among so many tokens (B, n, D); zeros elsewhere."""
    # By gathering, with a row of zeros for those that skip: not every runtime has a scatter.
    here = (index[..., None] == torch.arange(tokens, device=index.device)).any(dim=1)  # (B, n)
    place = torch.where(here, here.long().cumsum(1) - 1, y.shape[1])
    return rows(torch.cat([y, torch.zeros_like(y[:, :1])], dim=1), place)


class SkipSpatialTokens(Pass):
    """Let the tokens that the feed-forward changes least skip it, in every block, as a router foretells it."""

    needs_calibration: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    not_after: ClassVar[tuple[str, ...]] = SHORTENS

    ratio: float = Field(0.5, ge=0, lt=1, description="share of the tokens that skip the feed-forward, rounded down")
    exclude: tuple[str, ...] = Field((), description="glob patterns of block paths whose feed-forward works on all")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Fit a router for every block.

        Raises ``ToolchainError`` for a pattern that matches no block, and changes that are not finite.
        """
        stacks, skipped = token_stacks(model, context)
        check_patterns(self.exclude, blocks_of(stacks), what="block")
        wanted: dict[str, Found] = {}
        for found in stacks:
            for path in blocks_of([found]):
                if reason := excluded_by(path, self.exclude) or self.reason_to_skip(found):
                    skipped[path] = reason
                else:
                    wanted[path] = found
        seen = watched(model, list(wanted), context) if wanted else {}
        choice: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        arrays: dict[str, Tensor] = {}
        for path in wanted:
            if not seen[path]:
                skipped[path] = "the calibration inputs never reach it"
                continue
            weight, bias = self.router(seen[path], path)
            choice[path] = {"ratio": self.ratio}
            arrays |= {f"{path}.router.weight": weight, f"{path}.router.bias": bias}
            facts[path] = self.passed_on(seen[path], weight)
        tokens = {found.path: found.tokens for found in stacks}
        return Plan(choice=choice, skipped=skipped, facts={"tokens": tokens, "change": facts}, arrays=arrays)

    def reason_to_skip(self, found: Found) -> str:
        """Why the blocks of a stack are left alone; empty when they are not."""
        if not found.stack.square:
            return "its tokens are not the patches of a picture"
        if not self.ratio:
            return "a ratio of 0 lets every token pass"
        content = None if found.tokens is None else found.tokens - found.stack.leading
        if content is not None and number_passing(self.ratio, content, 0) == content:
            return f"a ratio of {self.ratio} of {content} tokens lets every one pass"
        return ""

    def router(self, seen: Sequence[tuple[Tensor, Tensor]], path: str) -> tuple[Tensor, Tensor]:
        """Weight (1, D) and bias (1,) from what a block saw; a logit of 0 parts the share that skips."""
        x = torch.cat([tokens.flatten(0, 1) for tokens, _ in seen])  # (S, D)
        change = torch.cat([found.flatten() for _, found in seen])
        if not (x.isfinite().all() and change.isfinite().all()):
            raise ToolchainError("what its feed-forward changes is not finite", where=path)
        weight, _ = fit(x, change[:, None])
        logits = (x.float() @ weight[0]).sort().values
        border = max(int(self.ratio * len(logits)), 1)
        return weight, -logits[border - 1 : border + 1].mean()[None]

    def passed_on(self, seen: Sequence[tuple[Tensor, Tensor]], weight: Tensor) -> dict[str, float]:
        """Of the sum of changes on the calibration inputs the share of tokens that pass, and of those changed most."""
        sums = torch.zeros(3, dtype=torch.float64)
        for x, change in seen:
            count = number_passing(self.ratio, change.shape[1], 0)
            chosen = (x.float() @ weight[0]).topk(count).indices
            sums += torch.stack([change.gather(1, chosen).sum(), change.topk(count).values.sum(), change.sum()])
        router, most, total = sums.tolist()
        return {name: float(f"{value / max(total, 1e-30):.6g}") for name, value in (("router", router), ("best", most))}

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Put a run of all blocks in the place of each stack with a chosen block."""

        def step(stack: TokenStack, block: nn.Module, path: str) -> Step:
            if path not in plan.choice:
                return Step(block, stack.block)
            weight, bias = (plan.arrays[f"{path}.router.{name}"] for name in ("weight", "bias"))
            judge = linear(weight, bias, next(block.parameters()))
            ratio = plan.choice[path]["ratio"]
            return SkipStep(block, stack.block, judge, ratio=ratio, leading=stack.leading)

        return replace_stacks(model, plan, step, restore=False)


def watched(model: nn.Module, paths: Sequence[str], context: Context) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What the blocks at these paths saw on the calibration inputs; the model stays as it was."""
    steps: dict[str, WatchStep] = {}

    def step(stack: TokenStack, block: nn.Module, path: str) -> Step:
        steps[path] = WatchStep(block, stack.block, leading=stack.leading)
        return steps[path]

    twin = replace_stacks(share(model), Plan(choice=dict.fromkeys(paths)), step, restore=False).eval()
    with torch.no_grad():
        for done, call in enumerate(context.calibration, start=1):
            twin(**call)
            context.say(done, len(context.calibration), "watching feed-forwards")
    return {path: steps[path].seen for path in paths}


def linear(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    """Around weight (1, D) and bias (1,), with the type and device of a tensor; draws no random numbers."""
    made = nn.Linear(weight.shape[1], 1, device="meta")
    made.weight, made.bias = (nn.Parameter(value.detach().clone().to(like)) for value in (weight, bias))
    return made
