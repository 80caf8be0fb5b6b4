"""Run only some blocks of each group of neighbours, others at other timesteps: a smaller network for each of them.

Source: Dense2MoE 2025 (ICCV), "Mixture of Blocks": a router picks kappa of the m blocks of a group, from the hidden
states and the embedding of timestep and prompt, one choice for each sample. Departures: its choice hangs mostly on the
timestep, so here it is tabled: one choice for each range of timesteps, which leaves networks without branches; and it
is not learned: a block's influence is how far the model's output moves without it, relative to the output. The facts
say how often a choice made for each sample alone would have been the same.

The rewritten model is all of these networks, switched by timestep, each a network for the engines; with ``bucket`` it
is that of one range alone. ``smaller`` gives that of any bucket from the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import INDEPENDENT_ROWS, ONE_NETWORK, Fact
from enginewright.ground.program import Table
from enginewright.passes.contract import Context, Decision, Facts, Inputs, Part, Pass, Plan
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import evaluating
from enginewright.passes.kernel.probes import first_floating
from enginewright.passes.kernel.roles import input_of
from enginewright.passes.kernel.rows import shared_inputs
from enginewright.passes.kernel.schedule import refuse_no_timestep, span_of
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.kernel.stacks import stacks_of
from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.walking import why_not_without
from enginewright.passes.networks import local, only_network, switched
from enginewright.passes.traits import BlockStack, layer_at

Stacks = Mapping[str, BlockStack]


class KeptBlocks(Decision):
    """The blocks of a stack that run."""

    kept: tuple[int, ...] | tuple[tuple[int, ...], ...] = Field(
        description="blocks that run, rising from 0; where ranges of timesteps differ, those of each"
    )
    of: int = Field(description="blocks that the stack has")


class Bucket(Part):
    """A range of timesteps, and the blocks that run in it."""

    low: float = Field(alias="from", description="where it begins")
    high: float = Field(alias="to", description="where it ends")
    samples: int = Field(description="calibration samples that fall in it")
    kept: dict[str, list[int]] = Field(description="by stack the blocks that stay")
    agreement: dict[str, float] = Field(description="by stack the share of samples that would keep the same")


class BucketFacts(Facts):
    """The ranges of timesteps, and what each keeps."""

    samples: int = Field(description="calibration samples")
    buckets: tuple[Bucket, ...] = Field(description="from the lowest timesteps up")
    bucket: int | None = Field(None, description="the only one that is built; null: all")
    input: str = Field("", description="that holds the timestep")
    shared: tuple[str, ...] = Field((), description="inputs that all rows of a call share")


class MixtureOfBlocks(Pass):
    """Keep the most influential blocks of every group, chosen apart for each range of timesteps."""

    needs_calibration: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (ONE_NETWORK, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (ONE_NETWORK,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (KeptBlocks,)
    facts: ClassVar[type[Facts]] = BucketFacts

    group: int = Field(2, ge=1, description="neighbouring blocks in a group; the last group may have fewer")
    keep: int = Field(1, ge=1, description="blocks of a group that run; as many as the group has: nothing changes")
    buckets: int = Field(4, ge=1, description="equal ranges of timesteps, each with its own choice")
    bucket: int | None = Field(
        None,
        ge=0,
        description="one range, from 0, for which alone the model is made; left out: all, switched by timestep",
    )
    timestep: str = Field("", description="the input that holds it; empty: the one of that role")
    low: float | None = Field(None, description="smallest timestep; left out: what the model says")
    high: float | None = Field(None, description="largest timestep; left out: what the model says, 1 or 1000")
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
    def one_that_there_is(cls, bucket: int | None, info: ValidationInfo) -> int | None:
        """Buckets count from 0."""
        if bucket is not None and bucket >= info.data.get("buckets", bucket + 1):
            raise ValueError(f"there are {info.data['buckets']} buckets, counted from 0")
        return bucket

    @field_validator("high")
    @classmethod
    def above_the_lowest(cls, high: float | None, info: ValidationInfo) -> float | None:
        """The largest timestep is above the smallest, which is 0 where it is left out."""
        low = info.data.get("low") or 0.0
        if high is not None and high <= low:
            raise ValueError(f"low is {low}")
        return high

    def plan(self, model: nn.Module, context: Context) -> Plan[KeptBlocks, BucketFacts]:
        """Choose the blocks of every bucket; a bucket that no calibration sample falls into takes all samples.

        Raises ``ToolchainError`` for an input that is not there and for an ``exclude`` pattern that matches no stack.
        """
        stacks, others = stacks_of(model)
        check_patterns(self.exclude, stacks, what="stack of blocks")
        skipped = {path: reason for path, stack in stacks.items() if (reason := self.reason_to_skip(path, stack))}
        skipped |= others
        if not stacks and not others:
            skipped[""] = "no family knows a stack of blocks in it"
        stacks = {path: stack for path, stack in stacks.items() if path not in skipped}
        skipped |= {path: why for path, s in stacks.items() if (why := why_not_without(model, path, s, (), context))}
        stacks = {path: stack for path, stack in stacks.items() if path not in skipped}
        if not stacks:
            return Plan(choice={}, skipped=skipped)
        resolved = self.resolved(context)
        whole = outputs(model, context.calibration)
        influences = self.influences(model, stacks, whole, context)
        buckets = resolved.buckets_of(context.calibration, [len(output) for output in whole])
        table = [resolved.entry(number, stacks, influences, buckets == number) for number in range(self.buckets)]
        facts = BucketFacts(samples=len(buckets), buckets=tuple(table))
        if resolved.bucket is not None:
            facts = facts.model_copy(update={"bucket": resolved.bucket})
        else:
            example = context.calibration[0]
            shared = (
                [] if example[resolved.timestep].ndim == 0 else shared_inputs(context, example, like=resolved.timestep)
            )
            facts = facts.model_copy(update={"input": resolved.timestep, "shared": tuple(shared)})
        if notes := self.notes(table):
            facts = facts.model_copy(update={"notes": tuple(notes)})
        choice = {
            path: KeptBlocks(kept=kept_in(table, resolved.bucket, path), of=len(s.blocks)) for path, s in stacks.items()
        }
        return Plan(choice=choice, skipped=skipped, facts=facts)

    def rewrite(self, model: nn.Module, plan: Plan[KeptBlocks, BucketFacts]) -> nn.Module:
        """Take the other blocks out; a network for each choice that some range of timesteps makes.

        Raises ``ToolchainError`` when a stack has not the blocks of the plan.
        """
        for path, kept in plan.choice.items():
            blocks = len(layer_at(model, path, BlockStack).blocks)
            if blocks != kept.of:
                raise ToolchainError(f"the plan is for a stack of {kept.of} blocks; this one has {blocks}", where=path)
        if not plan.choice:
            return model
        rows, bucket = plan.facts.buckets, plan.facts.bucket
        choices = [row.kept for row in (rows if bucket is None else [rows[bucket]])]
        networks = [each for number, each in enumerate(choices) if each not in choices[:number]]
        if len(networks) == 1:
            for path, blocks_ in networks[0].items():
                layer_at(model, path, BlockStack).keep_blocks(blocks_)
            return model
        # What lies in a range is nearest to its middle; from the last range down, so that a border is the upper's.
        middles = [(row.low + row.high) / 2 for row in reversed(rows)]
        ways = tuple(networks.index(each) for each in reversed(choices))
        whole, place = only_network(model)
        cut = {str(number): without(whole, local(own, place)) for number, own in enumerate(networks)}
        table = Table(input=plan.facts.input, timesteps=tuple(middles), ways=ways)
        return switched(model, cut, table, shared=plan.facts.shared)

    def resolved(self, context: Context) -> MixtureOfBlocks:
        """The same with the input that holds the timestep, and with its limits.

        Raises ``ToolchainError`` for an input that is not there or holds something else.
        """
        call = context.calibration[0]
        if self.buckets == 1:
            return self.model_copy(update={"bucket": 0, "low": self.low or 0.0, "high": self.high or 1000.0})
        otherwise = ", or buckets = 1"
        input = input_of("timestep", self.timestep, context.signature, call, setting="timestep", otherwise=otherwise)
        refuse_no_timestep(call, input, one_for_all=True)
        low, high = span_of(context, input)
        low, high = low if self.low is None else self.low, high if self.high is None else self.high
        if high <= low:
            raise ToolchainError(
                f"the timesteps of input {input!r} go from {low:g} to {high:g}", help="set low and high"
            )
        return self.model_copy(update={"timestep": input, "low": low, "high": high})

    def notes(self, table: Sequence[Bucket]) -> list[str]:
        """Which ranges no calibration sample falls into."""
        empty = [f"{row.low:g} to {row.high:g}" for row in table if not row.samples]
        if not empty:
            return []
        return [
            f"no calibration sample has a timestep of {', '.join(empty)}: blocks are chosen there as for all samples; "
            "check low and high"
        ]

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
        assert self.low is not None
        assert self.high is not None
        times = [call[self.timestep].double().reshape(-1) for call in calls]
        times = [time.expand(batch) for time, batch in zip(times, batches, strict=True)]  # one may serve the batch
        place = (torch.cat(times) - self.low) / (self.high - self.low)
        return (place * self.buckets).floor().clamp(0, self.buckets - 1).long()

    def entry(self, number: int, stacks: Stacks, influences: Mapping[str, Tensor], members: Tensor) -> Bucket:
        """A row of the table: the choice for the member samples (samples,), and the share that would make it too."""
        assert self.low is not None
        assert self.high is not None
        width = (self.high - self.low) / self.buckets
        seen = members if members.any() else torch.ones_like(members)
        kept, agreement = {}, {}
        for path, stack in stacks.items():
            found = influences[path][:, seen]
            kept[path] = self.strongest(significant(found.mean(1), where=path).tolist(), stack)
            own = [self.strongest(sample, stack) for sample in found.T.tolist()]
            agreement[path] = round(sum(choice == kept[path] for choice in own) / len(own), 6)
        return Bucket(
            low=self.low + number * width,
            high=self.low + (number + 1) * width,
            samples=int(members.sum()),
            kept=kept,
            agreement=agreement,
        )


def kept_in(table: Sequence[Bucket], bucket: int | None, path: str) -> Any:
    """The blocks of a stack that one range keeps; of several that differ, those of each."""
    each = [row.kept[path] for row in (table if bucket is None else [table[bucket]])]
    return each[0] if all(kept == each[0] for kept in each) else each


def smaller(model: nn.Module, plan: Plan, bucket: int) -> nn.Module:
    """The network for one bucket of a plan, as a copy around the same weights; the model stays whole."""
    return without(model, plan.facts.buckets[bucket].kept)


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
    return torch.tensor([six_digits(value) for value in values.tolist()], dtype=torch.float64)
