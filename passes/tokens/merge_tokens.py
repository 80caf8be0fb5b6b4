"""Merge the tokens that are most alike, a few in every block, and let attention weigh what they stand for.

Source: Bolya et al. 2022, arXiv:2210.09461 (ToMe) and the authors' code: bipartite soft matching on keys averaged
over heads, between attention and feed-forward; means weighted by size; proportional attention. Departures: tokens
that stay keep their order, and where the model needs them (``restore``) all tokens come back at the end, each as the
one that it went into. Every block must run on its own, so that a block that merges none only weighs.
Checked against facebookresearch/ToMe at commit af95e4b: merges in a row with none, one and two leading tokens give the
same tokens and sizes to rounding, the order apart where there is no class token, and both schedules the same r.

Where image and text attend together (SD3, Flux), image tokens are merged and text is not; a merged token turns by the
rotary position of its receiver. Flux's double and single blocks are two stacks: all tokens come back between them, and
single blocks merge after both halves, which run side by side there.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.facts import ALL_TOKENS, INDEPENDENT_ROWS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.tokens.matching import Form, clipped, match
from enginewright.passes.tokens.running import (
    Found,
    Step,
    TokenFacts,
    Tokens,
    blocks_of,
    refuse_lost_tokens,
    replace_stacks,
    token_stacks,
)
from enginewright.passes.traits import TokenBlock, TokenStack


class MergeStep(Step):
    """One block that merges its r most redundant tokens after attention."""

    def __init__(
        self, block: nn.Module, kind: type[TokenBlock], *, proportional: bool, r: int, leading: int, form: Form
    ) -> None:
        super().__init__(block, kind, proportional=proportional)
        self.r, self.leading, self.form = r, leading, form

    def between(self, tokens: Tokens, k: Tensor, ahead: int) -> None:
        """Compare keys, averaged over heads; take the size-weighted mean of what is merged."""
        r = clipped(self.r, tokens.x.shape[1] - ahead, self.leading)
        if not r:
            return
        matching = match(k.mean(dim=1)[:, ahead:], r, leading=self.leading)
        if ahead:
            matching = matching.behind(tokens.x, ahead)
            tokens.at = matching.stay if tokens.at is None else tokens.at.gather(1, matching.stay)
        tokens.x, tokens.size = matching.merge(tokens.x, tokens.size, self.form)
        tokens.move(matching.rows_of())


class MergedTokens(Decision):
    """The tokens that a block merges."""

    merge: int = Field(description="tokens that go into others")


class MergeTokens(Pass):
    """Merge r tokens in every block; shapes fall, and with them the work."""

    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (MergedTokens,)
    facts: ClassVar[type[Facts]] = TokenFacts

    r: int = Field(8, ge=0, description="tokens merged in a block; never more than half of those there")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: from twice r in the first block down to none in the last"
    )
    proportional: bool = Field(
        True,
        description="attention adds the logarithm of a token's size; off for models trained as masked autoencoders",
    )
    form: Form = Field(
        "onehot", description="how rows are added: a product with a 0/1 matrix (any runtime), or scatter (ONNX Runtime)"
    )
    restore: bool = Field(
        True, description="give the model all tokens back at its end; false where it reads leading tokens only"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of block paths that merge none")

    def plan(self, model: nn.Module, context: Context) -> Plan[MergedTokens]:
        """How many each block merges.

        Raises ``ToolchainError`` for a pattern that matches no block, and where a model needs the tokens that
        ``restore`` does not give back.
        """
        stacks, skipped = token_stacks(model, context)
        check_patterns(self.exclude, blocks_of(stacks), what="block")
        choice: dict[str, MergedTokens] = {}
        for found in stacks:
            refuse_lost_tokens(found, restore=self.restore)
            self.decide(found, choice, skipped)
        facts = TokenFacts(tokens={found.path: found.tokens for found in stacks})
        return Plan(choice=choice, skipped=skipped, facts=facts)

    def decide(self, found: Found, choice: dict[str, MergedTokens], skipped: dict[str, str]) -> None:
        """Enter each block of a stack into the choice or among those left alone."""
        tokens = found.tokens
        for number, asked in enumerate(self.amounts(len(found.stack.blocks))):
            path = found.block(number)
            r = asked if tokens is None else clipped(asked, tokens, found.stack.leading)
            if found.stack.padded:
                skipped[path] = (
                    "some tokens may be padding, which must not be merged; prune_tokens can drop tokens here"
                )
            elif reason := excluded_by(path, self.exclude):
                skipped[path] = reason
            elif r == 0:
                skipped[path] = f"r is {asked} here" if asked == 0 else f"{tokens} tokens are too few to merge"
            else:
                choice[path] = MergedTokens(merge=r)
                tokens = None if tokens is None else tokens - r

    def amounts(self, blocks: int) -> list[int]:
        """r of each block before clipping (the authors' ``parse_r`` with an inflection of 0 or -1)."""
        if self.schedule == "constant":
            return [self.r] * blocks
        step = 2 * self.r / (blocks - 1) if blocks > 1 else 0.0
        return [int(2 * self.r - step * i) for i in range(blocks)]

    def rewrite(self, model: nn.Module, plan: Plan[MergedTokens]) -> nn.Module:
        """Put a run of all blocks in the place of each stack of which some block merges."""

        def step(stack: TokenStack, block: nn.Module, path: str) -> Step:
            if path not in plan.choice:
                return Step(block, stack.block, proportional=self.proportional)
            r = plan.choice[path].merge
            leading, weighs = stack.leading, self.proportional
            return MergeStep(block, stack.block, proportional=weighs, r=r, leading=leading, form=self.form)

        return replace_stacks(model, plan, step, restore=self.restore)
