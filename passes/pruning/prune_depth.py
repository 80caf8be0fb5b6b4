"""Remove whole blocks of a stack: the residual stream goes past them.

Sources: ShortGPT, Men et al. 2024, arXiv:2403.03853, equation 1: a block's influence is 1 minus the mean cosine of what
goes into it and what comes out, over tokens. ``greedy`` removes one block at a time, the one whose removal leaves the
highest score. Departure: of blocks that carry two streams (image and text), the hidden states' alone is compared.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from enginewright.ground.errors import ToolchainError, unknown
from enginewright.ground.facts import FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Json, Pass, Plan, Score
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import Look, evaluating, observe, tensors_in
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.kernel.stacks import stacks_of
from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.walking import why_not_without
from enginewright.passes.traits import BlockStack, layer_at

Stacks = Mapping[str, BlockStack]
Gone = dict[str, list[int]]
"""Positions of the blocks that go, by stack."""


class RemovedBlocks(Decision):
    """The blocks that a stack loses."""

    removed: tuple[int, ...] = Field(description="blocks that go, rising from 0")
    of: int = Field(description="blocks that the stack has")


class DepthFacts(Facts):
    """What blocks were judged by."""

    method: str = Field(description="that was asked for")
    influence: dict[str, float] = Field({}, description="by block: 1 minus the mean cosine of what it takes and gives")
    calibration_batches: int = Field(0, description="calls, where the method needs some")
    rounds: tuple[dict[str, Json], ...] = Field(
        (), description="of a greedy search: the block that went, and the scores without each"
    )


class PruneDepth(Pass):
    """Remove the blocks of each stack that matter least; one always stays."""

    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)

    functions: ClassVar[tuple[str, ...]] = ("score",)
    looks_for: ClassVar[str] = "stacks of blocks that a family knows"
    decisions: ClassVar[tuple[type[Decision], ...]] = (RemovedBlocks,)
    facts: ClassVar[type[Facts]] = DepthFacts

    share: float = Field(0.25, ge=0, lt=1, description="fraction of each stack's blocks removed, rounded, halves up")
    count: int | None = Field(None, ge=0, description="number of blocks removed from each stack, instead of a share")
    method: Literal["influence", "greedy", "list"] = Field(
        "influence", description="influence compares streams on calibration inputs; greedy asks the score; list is told"
    )
    score: str = Field("fidelity", description="for method=greedy: what the model must keep; higher is better")
    blocks: tuple[str, ...] = Field((), description="for method=list: paths of the blocks to remove")
    exclude: tuple[str, ...] = Field((), description="glob patterns of block paths that stay")

    def plan(self, model: nn.Module, context: Context) -> Plan[RemovedBlocks]:
        """Choose the blocks that go.

        Raises ``ToolchainError`` for ``influence`` without calibration inputs, blocks without values, and blocks named
        that are none, must stay or are all there are.
        """
        stacks, others = stacks_of(model)
        check_patterns(self.exclude, [path for s in stacks for path in paths_of(s, stacks[s])], what="block")
        stays = {
            f"{name}.{i}": reason
            for name, stack in stacks.items()
            for i in range(len(stack.blocks))
            if (reason := stack.fixed.get(i, "") or excluded_by(f"{name}.{i}", self.exclude))
        }
        numbers = {name: self.number_removed(name, stack, stays) for name, stack in stacks.items()}
        facts = DepthFacts(method=self.method)
        if self.method == "list":
            gone, whole = self.listed(stacks, stays), {}
        else:
            first = {
                name: [i for i, path in enumerate(paths_of(name, s)) if path not in stays] for name, s in stacks.items()
            }
            whole = kept_whole(model, stacks, {name: first[name][: numbers[name]] for name in stacks}, context)
            numbers = {name: number if name not in whole else 0 for name, number in numbers.items()}
            gone, facts = self.judged(model, stacks, stays, numbers, context)
        whole |= kept_whole(model, stacks, gone, context)
        choice = {
            name: RemovedBlocks(removed=tuple(sorted(gone[name])), of=len(stacks[name].blocks))
            for name in gone
            if gone[name] and name not in whole
        }
        skipped = {
            name: whole.get(name) or self.reason(stacks[name], name, stays) for name in stacks if name not in choice
        }
        return Plan(choice=choice, skipped=stays | skipped | others, facts=facts)

    def rewrite(self, model: nn.Module, plan: Plan[RemovedBlocks]) -> nn.Module:
        """Cut, in place. Raises ``ToolchainError`` when a stack has not the blocks that the plan was made for."""
        for name, blocks in plan.choice.items():
            stack = layer_at(model, name, BlockStack)
            if len(stack.blocks) != blocks.of:
                found = len(stack.blocks)
                raise ToolchainError(f"the plan is for a stack of {blocks.of} blocks; this has {found}", where=name)
            stack.keep_blocks([i for i in range(blocks.of) if i not in blocks.removed])
        return model

    def number_removed(self, name: str, stack: BlockStack, stays: Mapping[str, str]) -> int:
        """How many blocks of a stack go, never all, and none that stays."""
        of = len(stack.blocks)
        wanted = math.floor(self.share * of + 0.5) if self.count is None else self.count
        free = sum(path not in stays for path in paths_of(name, stack))
        return min(wanted, free, of - 1)

    def reason(self, stack: BlockStack, name: str, stays: Mapping[str, str]) -> str:
        """Why no block of a stack goes."""
        if all(path in stays for path in paths_of(name, stack)):
            return "each of its blocks stays"
        if self.method == "list":
            return "none of its blocks is named"
        if self.number_removed(name, stack, stays):
            return "the calibration inputs never reach its blocks, or they change the shape of the stream"
        wanted = f"a share of {self.share}" if self.count is None else f"a count of {self.count}"
        return f"{wanted} of its {len(stack.blocks)} blocks comes to none"

    def listed(self, stacks: Stacks, stays: Mapping[str, str]) -> Gone:
        """The blocks that the user named."""
        where = {f"{name}.{i}": (name, i) for name, stack in stacks.items() for i in range(len(stack.blocks))}
        gone: Gone = {}
        for path in dict.fromkeys(self.blocks):
            if path not in where:
                raise unknown("block", path, where)
            if path in stays:
                raise ToolchainError(f"block {path!r} must stay: {stays[path]}")
            name, i = where[path]
            gone.setdefault(name, []).append(i)
        for name, positions in gone.items():
            if len(positions) == len(stacks[name].blocks):
                raise ToolchainError(f"all {len(positions)} blocks of {name!r} are named; one must stay")
        return gone

    def judged(
        self,
        model: nn.Module,
        stacks: Stacks,
        stays: Mapping[str, str],
        numbers: Mapping[str, int],
        context: Context,
    ) -> tuple[Gone, DepthFacts]:
        """The blocks that an influence or a score chooses, and what it found."""
        stacks = {name: stack for name, stack in stacks.items() if numbers[name]}
        refuse_meta(stacks, self.method)
        if self.method == "greedy":
            if not stacks:
                return {}, DepthFacts(method=self.method)
            return greedy(model, stacks, stays, numbers, context, context.score_of(self.score))
        self.check_calibration(context, "method 'influence'", otherwise="name the blocks with method = 'list'")
        found = influences(model, stacks, context)
        gone: Gone = {}
        for name, number in numbers.items():
            free = [i for i in range(len(stacks[name].blocks)) if f"{name}.{i}" in found] if name in stacks else []
            free = [i for i in free if f"{name}.{i}" not in stays]
            gone[name] = sorted(free, key=lambda i, name=name: (found[f"{name}.{i}"], i))[:number]  # type: ignore[misc]
        return gone, DepthFacts(method=self.method, influence=found, calibration_batches=len(context.calibration))


def kept_whole(model: nn.Module, stacks: Stacks, gone: Gone, context: Context) -> dict[str, str]:
    """Stacks that cannot lose these blocks, and why, as one call of the model shows."""
    tried = {name: why_not_without(model, name, stacks[name], gone[name], context) for name in gone if gone[name]}
    return {name: reason for name, reason in tried.items() if reason}


def paths_of(name: str, stack: BlockStack) -> list[str]:
    """The paths of a stack's blocks."""
    return [f"{name}.{i}" for i in range(len(stack.blocks))]


def refuse_meta(stacks: Stacks, method: str) -> None:
    """Raise when blocks have no values to judge by."""
    for name, stack in stacks.items():
        if any(parameter.is_meta for parameter in stack.blocks.parameters()):
            raise ToolchainError(
                f"method {method!r} must run the model, and its weights are on the meta device, which holds no values",
                where=name,
                help="load the model's weights before planning, or name the blocks with method = 'list'",
            )


def greedy(
    model: nn.Module,
    stacks: Stacks,
    stays: Mapping[str, str],
    numbers: Mapping[str, int],
    context: Context,
    score: Score,
) -> tuple[Gone, DepthFacts]:
    """Remove, one at a time, the block without which the score is highest (of equals, the last); log every trial."""
    gone: Gone = {name: [] for name in stacks}
    rounds: list[dict[str, Any]] = []
    total = sum(numbers[name] for name in stacks)
    while len(rounds) < total:
        trials: dict[tuple[str, int], float] = {}
        for name, stack in stacks.items():
            for i in range(len(stack.blocks)):
                if len(gone[name]) < numbers[name] and i not in gone[name] and f"{name}.{i}" not in stays:
                    context.say(len(rounds), total, f"without {name}.{i}")
                    trials[name, i] = judged_without(model, {**gone, name: [*gone[name], i]}, score)
        name, i = max(reversed(trials), key=lambda trial: trials[trial])
        gone[name].append(i)
        rounds.append({"removed": f"{name}.{i}", "scores": {f"{n}.{j}": value for (n, j), value in trials.items()}})
    return gone, DepthFacts(method="greedy", rounds=tuple(rounds))


def judged_without(model: nn.Module, gone: Gone, score: Score) -> float:
    """The score of a copy, around the same tensors, that lacks some blocks; to 6 significant digits."""
    copy = share(model)
    for name, positions in gone.items():
        stack = layer_at(copy, name, BlockStack)
        stack.keep_blocks([i for i in range(len(stack.blocks)) if i not in positions])
    with evaluating(copy):
        value = score(copy)
    if not math.isfinite(value):
        raise ToolchainError(f"without {gone} the score is not finite: {value}")
    return six_digits(value)


def influences(model: nn.Module, stacks: Stacks, context: Context) -> dict[str, float]:
    """1 minus the mean cosine of a block's input and output over all tokens, for blocks that ran."""
    sums: dict[str, tuple[float, int]] = {}

    def add(path: str, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        before = named["hidden_states"] if "hidden_states" in named else args[0]
        after = stream(output, before, second="encoder_hidden_states" in named)
        if after is not None:
            cosines = F.cosine_similarity(before.double(), after.double(), dim=-1)  # (B, N)
            total, rows = sums.get(path, (0.0, 0))
            sums[path] = total + float(cosines.sum()), rows + cosines.numel()

    looks = [
        Look(block, after=partial(add, f"{name}.{i}"))
        for name, stack in stacks.items()
        for i, block in enumerate(stack.blocks)
    ]
    observe(model, looks, context, doing="comparing streams")
    found = {path: 1 - total / rows for path, (total, rows) in sums.items()}
    for path, value in found.items():
        if not math.isfinite(value):
            raise ToolchainError(f"its influence is not finite: {value}", where=path)
    return {path: six_digits(value) for path, value in found.items()}


def stream(output: Any, like: Tensor, *, second: bool) -> Tensor | None:
    """The hidden states among a block's outputs: the first of their shape, or the last where the text comes first."""
    fitting = [tensor for tensor in tensors_in(output) if tensor.shape == like.shape]
    return fitting[-1 if second else 0] if fitting else None
