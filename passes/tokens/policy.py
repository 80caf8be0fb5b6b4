"""The policy of IA-RED2 as it is trained: each picture keeps as many tokens as score above 0.5, or as chance says.

Source: Pan et al. 2021, arXiv:2106.12620 (IA-RED2), sections 3.2 and 3.3, from memory: token j stays by chance with the
interpreter's score as probability; the reward is 1 - (share kept)^2 where the class is right, else -tau; its gradient
is REINFORCE's, with the reward of the policy that keeps what scores above 0.5 as the baseline. No code of the authors
was found. Tokens that go are hidden from all others, which is the same as dropped and lets pictures of one batch
keep different numbers. What to train on, and for how long, is the caller's (toolchain/training/vit_digits.py).

Shapes: B batch, n tokens (leading ones included), N tokens (leading ones apart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.passes.contract import Plan
from enginewright.passes.tokens.interpreter import Interpreter, interpreter
from enginewright.passes.tokens.running import Step, Tokens, replace_stacks
from enginewright.passes.traits import TokenBlock, TokenStack


class HideStep(Step):
    """One block before which the tokens that an interpreter scores at most 0.5 are hidden, for good.

    Args:
        block: the block.
        kind: how a call of it is taken apart.
        interpreter: scores each token.
        leading: tokens at the front that stay anyway.

    Attributes:
        draws: whether chance decides, with the scores as probabilities.
        seen: the tokens (B, N, D) of the last call,
        there: which of them no earlier border had hidden (B, N),
        kept: and which of them stayed (B, N).
    """

    seen: Tensor
    there: Tensor
    kept: Tensor

    def __init__(self, block: nn.Module, kind: type[TokenBlock], interpreter: Interpreter, *, leading: int) -> None:
        super().__init__(block, kind)
        self.interpreter, self.leading, self.draws = interpreter.train(block.training), leading, False

    def forward(self, tokens: Tokens, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Hide, then the block."""
        self.seen = tokens.x[:, self.leading :].detach()
        scores = self.interpreter(self.seen)  # (B, N)
        mask = torch.zeros_like(tokens.x[:, :, 0]) if tokens.mask is None else tokens.mask[:, 0, 0]  # (B, n)
        self.there = mask[:, self.leading :] >= 0
        self.kept = self.there & (torch.bernoulli(scores) > 0 if self.draws else scores > 0.5)
        stay = torch.cat([torch.ones_like(mask[:, : self.leading], dtype=torch.bool), self.kept], dim=1)
        tokens.mask = torch.zeros_like(mask).masked_fill(~stay, torch.finfo(mask.dtype).min)[:, None, None]
        super().forward(tokens, inputs, named)


def hide_tokens(model: nn.Module, plan: Plan) -> list[HideStep]:
    """Put steps that hide in a model, in place, where a plan of ``prune_tokens`` with a policy has borders.

    Returns:
        Them, in order.
    """
    found: list[HideStep] = []

    def step(stack: TokenStack, block: nn.Module, path: str) -> Step:
        if path not in plan.choice:
            return Step(block, stack.block)
        weight, bias = (plan.array(f"{path}.interpreter.{name}") for name in ("weight", "bias"))
        judge = interpreter(weight, bias, next(block.parameters()))
        found.append(HideStep(block, stack.block, judge, leading=stack.leading))
        return found[-1]

    replace_stacks(model, plan, step, restore=True)
    return found


def reward(kept: Tensor, right: Tensor, *, tau: float) -> Tensor:
    """What each picture's choice (B, N) is worth, (B,): 1 - (share kept)^2 where the class is right (B,), else -tau."""
    return torch.where(right, 1 - kept.double().mean(dim=1).square(), -tau)


def log_probability(scores: Tensor, kept: Tensor, there: Tensor) -> Tensor:
    """Of each picture's choice among the tokens that were there, all (B, N) -> (B,)."""
    chance = torch.where(kept, scores, 1 - scores).clamp(min=1e-6)
    return (chance.log() * there).sum(dim=1)


def policy_loss(step: HideStep, right: Callable[[], Tensor], *, tau: float) -> Tensor:
    """A number whose gradient by one interpreter is an estimate of minus that of the mean reward.

    Args:
        step: the border that learns; earlier borders must not draw.
        right: calls the model, and says of which pictures it told the class (B,); the same pictures each time.
        tau: what a wrong class costs.
    """
    with torch.no_grad():
        certain = right()
        baseline = reward(step.kept, certain, tau=tau)
        step.draws = True
        try:
            drawn = right()
        finally:
            step.draws = False
        advantage = reward(step.kept, drawn, tau=tau) - baseline
    return -(advantage * log_probability(step.interpreter(step.seen), step.kept, step.there)).mean()
