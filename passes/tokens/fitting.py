"""A start for IA-RED2's interpreters from calibration inputs, and how many tokens each of them would keep.

Shapes: B batch, N tokens (leading ones apart), H heads, D width, S samples (tokens of all calls).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.passes.contract import Context
from enginewright.passes.kernel.observe import observe
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.dropping import probabilities, received
from enginewright.passes.tokens.interpreter import fit, interpreter
from enginewright.passes.tokens.running import Found, Step, TokenRun, Tokens, stack_at
from enginewright.passes.traits import TokenBlock


class Watch(Step):
    """One block that notes its input and the attention that each token gets in it."""

    def __init__(self, block: nn.Module, kind: type[TokenBlock], *, by_class: bool, leading: int) -> None:
        super().__init__(block, kind)
        self.by_class, self.leading = by_class, leading
        self.inputs: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.real: list[Tensor] = []

    def forward(self, tokens: Tokens, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Note, then the block."""
        call = self.kind(self.block, *inputs, **named)
        q, k, _ = call.heads(call.attention_input(tokens.x))
        if self.by_class:
            got = probabilities(q[:, :, :1], k, tokens.mask)[:, :, 0]  # (B, H, N)
        else:
            got = received(probabilities(q, k, tokens.mask), tokens.mask)
        mask, content = tokens.mask, slice(self.leading, None)
        real = torch.ones_like(tokens.x[:, :, 0]) if mask is None else (mask[:, 0, 0] >= 0).to(tokens.x)
        self.inputs.append(tokens.x[:, content])
        self.attention.append(got.transpose(1, 2)[:, content])
        self.real.append(real.expand(tokens.x.shape[:2])[:, content] > 0)
        super().forward(tokens, inputs, named)


def watched(model: nn.Module, found: Found, context: Context) -> list[Watch]:
    """What each block of a stack saw on the calibration inputs; the model stays as it was."""
    twin = share(model)
    stack = stack_at(twin, found.path)
    by_class = stack.leading > 0 and not stack.padded
    steps = [Watch(block, stack.block, by_class=by_class, leading=stack.leading) for block in stack.blocks]
    stack.replace_blocks(TokenRun(steps, restore=True))
    observe(twin, (), context, doing="watching attention")
    return steps


def fitted(
    model: nn.Module, found: Found, borders: Sequence[int], context: Context, *, quantile: float | None
) -> tuple[dict[str, Tensor], list[int] | None]:
    """Weights and biases of an interpreter before each border, and, given a quantile, how many tokens each keeps.

    A border's target is the attention over the blocks up to the next border. Counts are those of tokens that this
    border and all before it score above 0.5, on the untouched model; the quantile is taken over pictures.
    """
    steps = watched(model, found, context)
    arrays: dict[str, Tensor] = {}
    counts: list[int] = []
    left = [real.clone() for real in steps[0].real]
    for border, end in zip(borders, (*borders[1:], len(steps)), strict=True):
        group = steps[border:end]
        tokens, real = steps[border].inputs, steps[border].real
        shares = [over_mean(sum_of([s.attention[i] for s in group]), real[i]) for i in range(len(tokens))]
        x = torch.cat([t[r] for t, r in zip(tokens, real, strict=True)])  # (S, D)
        weight, bias = fit(x, torch.cat([share[r] for share, r in zip(shares, real, strict=True)]))
        path = f"{found.block(border)}.interpreter"
        arrays |= {f"{path}.weight": weight, f"{path}.bias": bias}
        judge = interpreter(weight, bias, tokens[0])
        with torch.no_grad():
            left = [keep & (judge(t) > 0.5) for keep, t in zip(left, tokens, strict=True)]
        needed = torch.cat([keep.sum(dim=1) for keep in left]).float()
        counts.append(max(int(torch.quantile(needed, quantile, interpolation="higher")), 1) if quantile else 0)
    return arrays, counts if quantile else None


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Of tensors of one shape."""
    return torch.stack(list(tensors)).sum(dim=0)


def over_mean(attention: Tensor, real: Tensor) -> Tensor:
    """Attention (B, N, H) over its mean among the real tokens (B, N)."""
    weight = real[..., None].to(attention)
    return attention / ((attention * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True))
