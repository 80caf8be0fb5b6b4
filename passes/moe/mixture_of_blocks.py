"""Run only some blocks of each group of neighbours, others at other timesteps: a smaller network for each of them.

Source: Dense2MoE 2025 (ICCV), "Mixture of Blocks": a router picks kappa of the m blocks of a group, from the hidden
states and the embedding of timestep and prompt, one choice for each sample. Departures: its choice hangs mostly on the
timestep, so here it is tabled: one choice for each range of timesteps, which leaves networks without branches; and it
is not learned: a block's influence is how far the model's output moves without it, relative to the output. The facts
say how often a choice made for each sample alone would have been the same.

The rewritten model is the one for ``bucket``; ``smaller`` gives that of any bucket from the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from passes.contract import Context, Inputs, Pass, Plan
from passes.pruning.probes import evaluating, first_floating
from passes.selection import check_patterns, excluded_by
from passes.surgery import share
from passes.traits import BlockStack, layer_at, layers_of
from toolchain.errors import ToolchainError

TIMESTEPS = ("timestep", "timesteps", "t")
"""Names that models give the input."""

Stacks = Mapping[str, BlockStack]


class MixtureOfBlocks(Pass):
    """Keep the most influential blocks of every group, chosen apart for each range of timesteps."""

    needs_calibration: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("mixture_of_blocks",)

    group: int = Field(2, ge=1, description="neighbouring blocks in a group; the last group may have fewer")
    keep: int = Field(1, ge=1, description="blocks of a group that run; as many as the group has: nothing changes")
    buckets: int = Field(4, ge=1, description="equal ranges of timesteps, each with its own choice")
    bucket: int = Field(0, ge=0, description="the range that the rewritten model is for, from 0")
    timestep: str = Field("", description="the input that holds it; empty: timestep, timesteps or t")
    low: float = Field(0.0, description="smallest timestep")
    high: float = Field(1000.0, description="largest timestep")
    exclude: tuple[str, ...] = Field((), description="glob patterns of stacks of blocks that run whole")

    @field_validator("keep")
    @classmethod
    def no_more_than_a_group(cls, keep: int, info: ValidationInfo) -> int:
        """A group cannot run more blocks than it has."""
        if keep > info.data.get("group", keep):
            raise ValueError(f"a group has {info.data['group']} blocks")
        return keep

    @field_validator("bucket")
    @classmethod
    def one_that_there_is(cls, bucket: int, info: ValidationInfo) -> int:
        """Buckets count from 0."""
        if bucket >= info.data.get("buckets", bucket + 1):
            raise ValueError(f"there are {info.data['buckets']} buckets, counted from 0")
        return bucket

    @field_validator("high")
    @classmethod
    def above_the_lowest(cls, high: float, info: ValidationInfo) -> float:
        """A range has a width."""
        if high <= info.data.get("low", high - 1):
            raise ValueError(f"low is {info.data['low']}")
        return high

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the blocks of every bucket; a bucket that no calibration sample falls into takes all samples.

        Raises ``ToolchainError`` for an input that is not there and for an ``exclude`` pattern that matches no stack.
        """
        stacks = dict(layers_of(model, BlockStack))
        check_patterns(self.exclude, stacks, what="stack of blocks")
        skipped = {path: reason for path, stack in stacks.items() if (reason := self.reason_to_skip(path, stack))}
        if not stacks:
            skipped[""] = "no family knows a stack of blocks in it"
        stacks = {path: stack for path, stack in stacks.items() if path not in skipped}
        if not stacks:
            return Plan(choice={}, skipped=skipped)
        whole = outputs(model, context.calibration)
        influences = self.influences(model, stacks, whole, context)
        buckets = self.buckets_of(context.calibration, [len(output) for output in whole])
        table = [self.entry(number, stacks, influences, buckets == number) for number in range(self.buckets)]
        choice = {
            path: {"kept": table[self.bucket]["kept"][path], "of": len(stack.blocks)} for path, stack in stacks.items()
        }
        return Plan(
            choice=choice, skipped=skipped, facts={"bucket": self.bucket, "samples": len(buckets), "buckets": table}
        )

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Take the other blocks out. Raises ``ToolchainError`` when a stack has not the blocks of the plan."""
        for path, entry in plan.choice.items():
            stack = layer_at(model, path, BlockStack)
            if len(stack.blocks) != entry["of"]:
                raise ToolchainError(
                    f"the plan is for a stack of {entry['of']} blocks; this one has {len(stack.blocks)}", where=path
                )
            stack.keep_blocks(entry["kept"])
        return model

    def reason_to_skip(self, path: str, stack: BlockStack) -> str:
        """Why all blocks of a stack run; empty when not all do."""
        if reason := excluded_by(path, self.exclude):
            return reason
        blocks = len(stack.blocks)
        if len(self.strongest([0.0] * blocks, stack)) < blocks:
            return ""
        why = "".join(f"; block {block} stays: {reason}" for block, reason in stack.fixed.items())
        return f"all of its {blocks} blocks run where {self.keep} of each {self.group} are kept{why}"

    def strongest(self, influence: Sequence[float], stack: BlockStack) -> list[int]:
        """The blocks to keep: those that must stay, and the most influential of each group, of equal ones the first."""
        kept: list[int] = []
        for start in range(0, len(influence), self.group):
            members = range(start, min(start + self.group, len(influence)))
            ranked = sorted(members, key=lambda block: (block not in stack.fixed, -influence[block], block))
            must = sum(block in stack.fixed for block in members)
            kept += sorted(ranked[: max(self.keep, must)])
        return kept

    def influences(
        self, model: nn.Module, stacks: Stacks, whole: Sequence[Tensor], context: Context
    ) -> dict[str, Tensor]:
        """(blocks, samples) for each stack: the relative change of the output (``whole``) without the block."""
        samples = sum(len(output) for output in whole)
        found = {path: torch.zeros(len(s.blocks), samples, dtype=torch.float64) for path, s in stacks.items()}
        tried = [(path, block) for path, s in stacks.items() for block in range(len(s.blocks)) if block not in s.fixed]
        for done, (path, block) in enumerate(tried):
            context.say(done, len(tried), f"running without block {block} of {path}")
            others = [other for other in range(len(found[path])) if other != block]
            changed = outputs(without(model, {path: others}), context.calibration)
            moved = torch.cat([relative_change(a, b) for a, b in zip(whole, changed, strict=True)])
            found[path][block] = significant(moved, where=path)
        return found

    def buckets_of(self, calls: Sequence[Inputs], batches: Sequence[int]) -> Tensor:
        """The bucket (samples,) of each sample of calls of these sizes; beyond the range, the nearest."""
        if self.buckets == 1:
            return torch.zeros(sum(batches), dtype=torch.long)
        names = [self.timestep] if self.timestep else TIMESTEPS
        name = next((name for name in names if name in calls[0]), None)
        if name is None:
            raise ToolchainError(
                f"no input of the model is called {' or '.join(repr(name) for name in names)}",
                help=f"its inputs: {', '.join(calls[0])}; set timestep to one of them, or buckets = 1",
            )
        times = [call[name].double().reshape(-1) for call in calls]
        times = [time.expand(batch) for time, batch in zip(times, batches, strict=True)]  # one may serve the batch
        place = (torch.cat(times) - self.low) / (self.high - self.low)
        return (place * self.buckets).floor().clamp(0, self.buckets - 1).long()

    def entry(self, number: int, stacks: Stacks, influences: Mapping[str, Tensor], members: Tensor) -> dict[str, Any]:
        """A row of the table: the choice for the member samples (samples,), and the share that would make it too."""
        width = (self.high - self.low) / self.buckets
        seen = members if members.any() else torch.ones_like(members)
        kept, agreement = {}, {}
        for path, stack in stacks.items():
            found = influences[path][:, seen]
            kept[path] = self.strongest(significant(found.mean(1), where=path).tolist(), stack)
            own = [self.strongest(sample, stack) for sample in found.T.tolist()]
            agreement[path] = round(sum(choice == kept[path] for choice in own) / len(own), 6)
        return {
            "from": self.low + number * width,
            "to": self.low + (number + 1) * width,
            "samples": int(members.sum()),
            "kept": kept,
            "agreement": agreement,
        }


def smaller(model: nn.Module, plan: Plan, bucket: int) -> nn.Module:
    """The network for one bucket of a plan, as a copy around the same weights; the model stays whole."""
    return without(model, plan.facts["buckets"][bucket]["kept"])


def without(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy around the same weights that has only these blocks of these stacks."""
    twin = share(model)
    for path, blocks in kept.items():
        layer_at(twin, path, BlockStack).keep_blocks(blocks)
    return twin


def outputs(model: nn.Module, calls: Sequence[Inputs]) -> list[Tensor]:
    """The first floating-point output (B, ...) of every call."""
    with torch.no_grad(), evaluating(model):
        return [first_floating(model(**inputs)) for inputs in calls]


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """L2 distance of each sample over its length before: (B, ...) -> (B,)."""
    before, after = before.double().flatten(1), after.double().flatten(1)
    return (after - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-12)


def significant(values: Tensor, *, where: str) -> Tensor:
    """Values (n,) to 6 significant digits, so that the last bits of another machine decide nothing."""
    if not values.isfinite().all():
        raise ToolchainError("the output of the model without one of its blocks is not finite", where=where)
    return torch.tensor([float(f"{value:.6g}") for value in values.tolist()], dtype=torch.float64)
