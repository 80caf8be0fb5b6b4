"""Let each block's feed-forward run on some of a picture's tokens only; the others pass by on the residual stream.

Source: DyDiT (Zhao et al. 2024, arXiv:2410.03456), section 3.3, spatial-wise dynamic token: a router reads the tokens
after the attention's residual and decides which of them the MLP works on; the attention always sees all. Departures:
the number of tokens that run is fixed, the same for every sample and timestep, so that shapes are: those of the highest
scores run, of each sample apart, where the paper takes all above 0.5; the router is one linear layer, not two, and is
not trained: it is fitted to how far the MLP moves each calibration token, relative to the token. Its bias puts 0.5
where the asked share is above it, and the facts say for how many samples more tokens were.

Blocks that bring trained routers of their own (DyDiT's) keep these. Their feed-forwards run on as many tokens as the
router ever let run on the calibration inputs, or on the ``quantile`` of that, and the router still shuts out those of
them that it would: a sample gets what the paper's masks give it, unless it needs more tokens than there is room for.

After ``slice_width_by_timestep``, the paper's other half, each of its networks gets routers of its own, fitted to the
calibration inputs of its timesteps, or counts of its own.

Gathering and putting back are TopK and Gather alone, which every target builds; masks would save nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import ALL_TOKENS, INDEPENDENT_ROWS, STATELESS_CALLS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.tokens.interpreter import interpreter
from enginewright.passes.tokens.running import Found, Step, blocks_of, replace_stacks, token_stacks
from enginewright.passes.tokens.skipping import SkipStep, counted, fitted
from enginewright.passes.traits import TokenStack, layers_of


class RunTokens(Decision):
    """The tokens that a block's feed-forward runs on."""

    arrays: ClassVar[Mapping[str, str]] = {
        ".router.weight": "of the layer that scores tokens, where the block has no router of its own",
        ".router.bias": "of that layer",
    }

    tokens: int = Field(description="content tokens that run")
    of: int = Field(description="content tokens that there are")


class RoutedFacts(Facts):
    """What the routers were fitted on; by a block's path, how well its router does."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, dict[str, float]]
    calibration_calls: int = Field(description="calls")


class SkipSpatialTokens(Pass):
    """Feed-forwards run on the same number of tokens of every sample: those that a fitted router picks."""

    needs_calibration: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS, STATELESS_CALLS, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (RunTokens,)
    facts: ClassVar[type[Facts]] = RoutedFacts

    ratio: float = Field(0.5, ge=0, lt=1, description="share of the content tokens that pass a feed-forward by")
    quantile: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the calibration samples whose tokens all run, in blocks that bring trained routers; the "
        "ratio is not for these",
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of block paths whose feed-forwards see all tokens")

    def plan(self, model: nn.Module, context: Context) -> Plan[RunTokens]:
        """How many tokens run, and the routers.

        Raises ``ToolchainError`` for an ``exclude`` that matches nothing, and values that are not finite.
        """
        stacks, skipped = token_stacks(model, context)
        check_patterns(self.exclude, blocks_of(stacks), what="block")
        choice: dict[str, RunTokens] = {}
        arrays: dict[str, Tensor] = {}
        told: dict[str, dict[str, float]] = {}
        counts = counted(model, [found for found in stacks if found.stack.block.routed], context)
        for found in stacks:
            if found.stack.block.routed:
                choice |= self.routed(found, counts, skipped, told)
                continue
            entries = self.entries(found, skipped)
            wanted = {number: entry.tokens for number, entry in entries.items()}
            routers = fitted(model, found, wanted, context) if wanted else {}
            for number, entry in entries.items():
                path = found.block(number)
                if number not in routers:
                    skipped[path] = "the calibration inputs never reach it"
                    continue
                router = routers[number]
                told[path] = router.facts
                arrays |= {f"{path}.router.weight": router.weight, f"{path}.router.bias": router.bias}
                choice[path] = entry
        facts = RoutedFacts(calibration_calls=len(context.calibration), **told)
        return Plan(choice=choice, skipped=skipped, facts=facts, arrays=arrays)

    def entries(self, found: Found, skipped: dict[str, str]) -> dict[int, RunTokens]:
        """How many content tokens run in each block; a block where all do is among those left alone."""
        chosen = {}
        for number in range(len(found.stack.blocks)):
            path = found.block(number)
            content = 0 if found.tokens is None else found.tokens - found.stack.leading
            count = max(round((1 - self.ratio) * content), 1)
            if reason := excluded_by(path, self.exclude):
                skipped[path] = reason
            elif not found.stack.square:
                skipped[path] = "its tokens are not those of a picture"
            elif not content:
                skipped[path] = "the example call never reaches it"
            elif count >= content:
                skipped[path] = f"a ratio of {self.ratio} of its {content} tokens comes to none"
            else:
                chosen[number] = RunTokens(tokens=count, of=content)
        return chosen

    def routed(
        self, found: Found, counts: Mapping[str, Tensor], skipped: dict[str, str], told: dict[str, dict[str, float]]
    ) -> dict[str, RunTokens]:
        """For each block, by path, room for as many tokens as its own router lets run of the samples (B,) counted."""
        chosen = {}
        for number in range(len(found.stack.blocks)):
            path = found.block(number)
            if reason := excluded_by(path, self.exclude):
                skipped[path] = reason
            elif found.tokens is None or path not in counts:
                skipped[path] = "the calibration inputs never reach it"
            else:
                content, needed = found.tokens - found.stack.leading, counts[path].double()
                count = max(int(torch.quantile(needed, self.quantile, interpolation="higher")), 1)
                told[path] = {
                    "tokens_let_run": six_digits(float(needed.mean())),
                    "samples_with_more_above_half": six_digits(float((needed > count).double().mean())),
                }
                if count < content:
                    chosen[path] = RunTokens(tokens=count, of=content)
                else:
                    skipped[path] = f"its router lets all {content} tokens of a sample run"
        return chosen

    def rewrite(self, model: nn.Module, plan: Plan[RunTokens]) -> nn.Module:
        """Put a run of all blocks in the place of each stack with a router.

        Raises ``ToolchainError`` for a model that lacks a block of the plan.
        """
        known = {f"{s.path_in(o)}.{i}" for o, s in layers_of(model, TokenStack) for i in range(len(s.blocks))}
        for path in plan.choice:
            if path not in known:
                raise ToolchainError(f"the plan is for another model: {path!r} is no block of this one")

        def step(stack: TokenStack, block: nn.Module, path: str) -> Step:
            run = plan.choice.get(path)
            if run is None:
                return Step(block, stack.block)
            router = None
            if not stack.block.routed:
                weight, bias = (plan.array(f"{path}.router.{name}") for name in ("weight", "bias"))
                router = interpreter(weight, bias, next(block.parameters()))
            return SkipStep(block, stack.block, router, count=run.tokens, of=run.of, leading=stack.leading)

        return replace_stacks(model, plan, step, restore=False)
