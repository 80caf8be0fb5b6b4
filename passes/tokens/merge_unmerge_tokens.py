"""Let attention, or the whole block, work on fewer tokens, and give every token its result back within the block.

Source: Bolya and Hoffman 2023, arXiv:2303.17604 (ToMe for Stable Diffusion) and the authors' code: one token in each
cell of 2 x 2 receives, the most similar of the others go into it (plain mean) before the module and copy its result
after; matching once a block, on the block's input. Departures: the receiver is the top left token (the authors'
setting without randomness), so that two runs agree; every block takes part unless excluded. In a U-Net the blocks of
the largest resolution take part (the authors' default, ``max_downsample`` of 1; ``downsample`` here).
Checked against dbolya/tomesd at commit 27a14a3: merging, a function and copying back give the same rows to rounding, on
pictures of even and odd sides, at three ratios.

Where image and text attend together (SD3, Flux), image tokens are merged and text is not; a merged token turns by the
rotary position of its receiver. In Flux's single blocks the one output projection runs on all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.facts import ALL_TOKENS, INDEPENDENT_ROWS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.tokens.matching import Form, Matching, cell_corners, match, rows
from enginewright.passes.tokens.running import (
    Found,
    Step,
    TokenFacts,
    Tokens,
    blocks_of,
    joined,
    replace_stacks,
    token_stacks,
)
from enginewright.passes.traits import TokenBlock, TokenStack

Over = Literal["attention", "feed_forward", "both"]


class ShrunkStep(Step):
    """One block whose halves, or one of them, work on merged tokens."""

    def __init__(
        self, block: nn.Module, kind: type[TokenBlock], *, ratio: float, over: Over, leading: int, form: Form
    ) -> None:
        super().__init__(block, kind)
        self.ratio, self.over, self.leading, self.form = ratio, over, leading, form

    def forward(self, tokens: Tokens, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Match on the block's input, then run both halves."""
        call = self.kind(self.block, *inputs, **named)
        content = tokens.x[:, call.ahead :] if call.ahead else tokens.x
        count = content.shape[1]
        corners = cell_corners(count, leading=self.leading)
        matching = match(content, number_merged(self.ratio, count, self.leading), leading=self.leading, into=corners)
        if call.ahead:
            matching = matching.behind(tokens.x, call.ahead)
        if self.over != "feed_forward":
            call.keep_positions(matching.stay)

        def attention(y: Tensor) -> Tensor:
            q, k, v = call.heads(y)
            return call.output(joined(F.scaled_dot_product_attention(q, k, v)))

        half = self.through(matching, attention, at="attention")
        tokens.x = call.add_attention(tokens.x, half(call.attention_input(tokens.x)))
        half = self.through(matching, call.feed_forward, at="feed_forward")
        tokens.x = call.add_feed_forward(tokens.x, half(call.feed_forward_input(tokens.x)))

    def through(self, matching: Matching, half: Callable[[Tensor], Tensor], *, at: Over) -> Callable[[Tensor], Tensor]:
        """A half on merged tokens, if it is one that is asked for."""
        if self.over not in (at, "both"):
            return half
        return lambda y: rows(half(matching.merge(y, None, self.form)[0]), matching.rows_of())


def number_merged(ratio: float, tokens: int, leading: int) -> int:
    """Tokens that go: a share of all, and never one that receives."""
    receive = len(cell_corners(tokens, leading=leading))
    return min(int(ratio * tokens), tokens - leading - receive) if receive else 0


class ShrunkBlock(Decision):
    """How a block works on fewer tokens."""

    ratio: float = Field(description="share of all tokens that is merged")
    over: Over = Field(description="what works on merged tokens")


class MergeUnmergeTokens(Pass):
    """Merge a share of the tokens before attention (or the whole block), and copy the results back after."""

    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (ShrunkBlock,)
    facts: ClassVar[type[Facts]] = TokenFacts

    ratio: float = Field(
        0.5, ge=0, le=0.75, description="share of all tokens that is merged; at most 3 in each cell of 4"
    )
    over: Over = Field("attention", description="what works on merged tokens")
    downsample: int = Field(
        1, ge=1, description="in a U-Net: blocks whose sides are up to so many times smaller than the largest take part"
    )
    form: Form = Field(
        "onehot", description="how rows are added: a product with a 0/1 matrix (any runtime), or scatter (ONNX Runtime)"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of block paths left alone")

    def plan(self, model: nn.Module, context: Context) -> Plan[ShrunkBlock]:
        """Which blocks. Raises ``ToolchainError`` for a pattern that matches no block."""
        stacks, skipped = token_stacks(model, context)
        check_patterns(self.exclude, blocks_of(stacks), what="block")
        choice: dict[str, ShrunkBlock] = {}
        largest = max((found.tokens or 0 for found in stacks if found.stack.level), default=0)
        for found in stacks:
            for number in range(len(found.stack.blocks)):
                path = found.block(number)
                if reason := excluded_by(path, self.exclude) or self.reason_to_skip(found, largest):
                    skipped[path] = reason
                else:
                    choice[path] = ShrunkBlock(ratio=self.ratio, over=self.over)
        return Plan(choice=choice, skipped=skipped, facts=TokenFacts(tokens={f.path: f.tokens for f in stacks}))

    def reason_to_skip(self, found: Found, largest: int) -> str:
        """Why the blocks of a stack are left alone; empty when they are not.

        Args:
            found: the stack.
            largest: tokens at the largest resolution, where there are several.
        """
        if not found.stack.square:
            return "its tokens are not the patches of a square picture"
        if found.tokens is None:
            return "" if self.ratio else "a ratio of 0 merges none"
        if found.stack.level and found.tokens * self.downsample**2 < largest:
            return f"its {found.tokens} tokens are those of a smaller resolution; the largest has {largest}"
        content = found.tokens - found.stack.leading
        if isqrt(content) ** 2 != content:
            return f"its {content} tokens are not those of a square picture"
        if not number_merged(self.ratio, found.tokens, found.stack.leading):
            return f"a ratio of {self.ratio} of {found.tokens} tokens merges none"
        return ""

    def rewrite(self, model: nn.Module, plan: Plan[ShrunkBlock]) -> nn.Module:
        """Put a run of all blocks in the place of each stack with a chosen block."""

        def step(stack: TokenStack, block: nn.Module, path: str) -> Step:
            if path not in plan.choice:
                return Step(block, stack.block)
            shrunk = plan.choice[path]
            return ShrunkStep(
                block,
                stack.block,
                ratio=shrunk.ratio,
                over=shrunk.over,
                leading=stack.leading,
                form=self.form,
            )

        return replace_stacks(model, plan, step, restore=False)
