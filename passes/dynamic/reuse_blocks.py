"""Reuse what a range of blocks adds to the stream: whole at some steps of a sampler, without those blocks in between.

Sources: DeepCache (Ma et al. 2023, arXiv:2312.00858), section 3.2: one step in ``interval`` runs whole, the others take
the deep features that it left; Delta-DiT (Chen et al. 2024, arXiv:2406.01125) for networks without a U's shortcuts:
what is kept is the difference that a range of blocks makes to the stream, not the stream itself. Departures: the range
is contiguous and the same at all steps (Delta-DiT takes late blocks early and early ones late); by default it is the
one whose contribution changes least from the last whole step, on calibration inputs whose noise is held while the
timestep moves, over the norm of the stream after it. Of a U-Net only blocks within one transformer can be left out:
DeepCache's own cut, which keeps the input of the last up block, is not made.

Two engines: the whole network gives the contribution beside its output, the short one takes it as an input. Whoever
runs them keeps the tensor from call to call (``driver.Memory`` says when it may be reused).

Shapes: B batch, N tokens, D width, L blocks, T timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import (
    ALL_INPUTS,
    INDEPENDENT_ROWS,
    ONE_NETWORK,
    SINGLE_ROWS,
    STATELESS_CALLS,
    UNBLENDED_ATTENTION,
    Fact,
)
from enginewright.ground.program import Call, Network, Program, StateTensor, Table, Way
from enginewright.ground.signature import Dim, Signature, rows_of
from enginewright.passes.contract import Context, Decision, Facts, Inputs, Pass, Plan, macs
from enginewright.passes.dynamic.contributions import REUSED, giving, stream, taking
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import Look, evaluating, looking
from enginewright.passes.kernel.schedule import calls_at, even, span_of, timestep_of
from enginewright.passes.kernel.selection import check_patterns, excluded_by, is_within
from enginewright.passes.kernel.stacks import stacks_of
from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.walking import why_not_without
from enginewright.passes.networks import Networks, at_timestep, local, only_network, program_of
from enginewright.passes.traits import BlockStack, layer_at

WHOLE, SHORT = "whole", "short"
"""Names of the two networks."""


class ReusedBlocks(Decision):
    """The blocks of a stack that are left out at some steps."""

    blocks: tuple[int, ...] = Field(description="blocks that are left out, rising from 0 and without gaps")
    of: int = Field(description="blocks that the stack has")


class ReusedFacts(Facts):
    """The schedule, and what is kept from step to step."""

    chosen: str = Field(description="how the blocks were found")
    changes: dict[str, float] = Field(
        {}, description="by range of blocks: how far its contribution moves from step to step"
    )
    input: str = Field(description="that holds the timestep")
    timesteps: tuple[float, ...] = Field(description="of the schedule")
    table: tuple[int, ...] = Field(description="for each of them: 0, the network runs whole; 1, it reuses")
    shape: tuple[int, ...] = Field(description="of one row of what is kept")
    dtype: str = Field(description="of it")
    macs: dict[str, int] = Field(description="of a step of each kind, and of a run")


class ReuseBlocks(Pass):
    """Leave a range of blocks out at most steps, and reuse what they added at the last step that ran whole."""

    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (ONE_NETWORK, SINGLE_ROWS, ALL_INPUTS, UNBLENDED_ATTENTION, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (ONE_NETWORK, STATELESS_CALLS)
    decisions: ClassVar[tuple[type[Decision], ...]] = (ReusedBlocks,)
    facts: ClassVar[type[Facts]] = ReusedFacts

    interval: int = Field(2, ge=1, description="one step in so many runs whole, the first included (DeepCache's N)")
    whole: tuple[int, ...] = Field((), description="steps that run whole, from 0 and rising, instead of an interval")
    share: float = Field(
        0.5, gt=0, le=1, description="fraction of a stack's blocks that is left out, rounded, at least 1"
    )
    blocks: tuple[int, int] | None = Field(
        None, description="first and last of the blocks left out, from 0; None: by calibration inputs, or the middle"
    )
    timesteps: tuple[float, ...] = Field(
        (), description="the sampler's schedule; empty: even, from 999 to 0, or from 1 where the model counts so"
    )
    steps: int = Field(25, ge=1, le=1000, description="length of the even schedule")
    input: str = Field(
        "", description="the input that holds the timestep, one for each row; empty: the one of that role"
    )
    rows: int = Field(4, ge=1, description="calibration rows for each timestep: those of the nearest timesteps")
    exclude: tuple[str, ...] = Field((), description="glob patterns of stacks of blocks that always run whole")

    def plan(self, model: nn.Module, context: Context) -> Plan[ReusedBlocks, ReusedFacts]:
        """Choose the steps and the blocks.

        Raises ``ToolchainError`` for an input that is no timestep, steps that are none, blocks that must stay or are
        not there, an ``exclude`` that matches nothing, and without a call to look at.
        """
        stacks, others = stacks_of(model)
        check_patterns(self.exclude, stacks, what="stack of blocks")
        skipped = {path: reason for path in stacks if (reason := excluded_by(path, self.exclude))}
        table = self.table()
        if not stacks:
            return Plan(choice={}, skipped=others or {"": "no family knows a stack of blocks in it"})
        if not any(table):
            reason = "every step runs whole: there is nothing to reuse"
            return Plan(choice={}, skipped={path: skipped.get(path, reason) for path in stacks})
        example = context.example or next(iter(context.calibration), None)
        if not example:
            raise ToolchainError(f"{self.name()} looks at one call of the model and got none")
        resolved = self.resolved(context, example)
        found, whole = forms(model, stacks, example)
        rows = len(example[resolved.input])
        skipped |= {path: r for path in stacks if path not in skipped and (r := why_not(found.get(path), rows))}
        fit = [path for path in stacks if path not in skipped]
        skipped |= of_no_one_size(model, {path: stacks[path] for path in fit}, found, example, context)
        fit = [path for path in fit if path not in skipped]
        skipped |= {path: r for path in fit if (r := why_not_without(model, path, stacks[path], (), context))}
        fit = [path for path in fit if path not in skipped]
        if not fit:
            return Plan(choice={}, skipped=skipped)
        path = max(fit, key=lambda path: len(stacks[path].blocks))  # of equals the first
        skipped |= {other: f"one stack's blocks are reused, those of {path!r}" for other in fit if other != path}
        blocks, told = resolved.chosen(model, path, stacks[path], table, context)
        if not blocks:
            return Plan(choice={}, skipped={**skipped, path: "each of its blocks must stay"})
        short = macs(taking(share(model), path, blocks), example)
        tensor = found[path][0]
        facts = ReusedFacts(
            **told,
            input=resolved.input,
            timesteps=resolved.schedule(),
            table=tuple(table),
            shape=tuple(tensor.shape[1:]),
            dtype=str(tensor.dtype).removeprefix("torch."),
            macs=costs(whole, short, table),
            notes=tuple(notes(whole, short, table)),
        )
        reused = ReusedBlocks(blocks=tuple(blocks), of=len(stacks[path].blocks))
        return Plan(choice={path: reused}, skipped=skipped, facts=facts)

    def rewrite(self, model: nn.Module, plan: Plan[ReusedBlocks, ReusedFacts]) -> nn.Module:
        """The whole network and the short one. Raises ``ToolchainError`` for a stack of another length."""
        for path, reused in plan.choice.items():
            count = len(layer_at(model, path, BlockStack).blocks)
            if count != reused.of:
                raise ToolchainError(f"the plan is for a stack of {reused.of} blocks; this has {count}", where=path)
            network, place = only_network(model)
            [own] = local({path: None}, place)
            short = taking(share(network), own, reused.blocks)
            whole = giving(network, own, reused.blocks)
            once = {
                each: replace(found, modules=moved(found.modules, own, reused.blocks, each))
                for each in (WHOLE, SHORT)
                for found in program_of(model).hoisted.values()
            }
            program = replace(reusing(plan.facts), hoisted=once)
            return Networks({WHOLE: whole, SHORT: short}, program).train(model.training)
        return model

    def resolved(self, context: Context, example: Inputs) -> ReuseBlocks:
        """The same with the input that holds the timestep, and with the timesteps."""
        input = timestep_of(self.input, context, example)
        times = self.timesteps or even(self.steps, span_of(context, input)[1])
        return self.model_copy(update={"input": input, "timesteps": times})

    def schedule(self) -> tuple[float, ...]:
        """The timesteps."""
        return self.timesteps or even(self.steps)

    def table(self) -> list[int]:
        """For each timestep 0 where the network runs whole, else 1."""
        times = self.schedule()
        if len(set(times)) < len(times):
            twice = next(time for time in times if times.count(time) > 1)
            raise ToolchainError(f"timestep {twice:g} stands twice in the schedule: a step could not be told apart")
        if not self.whole:
            return [int(step % self.interval > 0) for step in range(len(times))]
        if list(self.whole) != sorted(set(self.whole)) or self.whole[0] != 0 or self.whole[-1] >= len(times):
            raise ToolchainError(f"whole is {self.whole}; steps rise from 0, the first, to at most {len(times) - 1}")
        return [int(step not in self.whole) for step in range(len(times))]

    def chosen(
        self, model: nn.Module, path: str, stack: BlockStack, table: Sequence[int], context: Context
    ) -> tuple[list[int], dict[str, Any]]:
        """The blocks that are left out, and how that was found."""
        count = len(stack.blocks)
        if self.blocks is not None:
            first, last = self.blocks
            if not 0 <= first <= last < count:
                raise ToolchainError(f"blocks are {first} to {last}; the stack has 0 to {count - 1}", where=path)
            for number in range(first, last + 1):
                if number in stack.fixed:
                    raise ToolchainError(f"block {path}.{number} must stay: {stack.fixed[number]}")
            return list(range(first, last + 1)), {"chosen": "as asked"}
        wanted = min(max(int(self.share * count + 0.5), 1), longest(count, stack.fixed))
        starts = [a for a in range(count - wanted + 1) if not set(range(a, a + wanted)) & set(stack.fixed)]
        if not wanted:
            return [], {}
        if not context.calibration or any(p.is_meta for p in model.parameters()):
            start = min(starts, key=lambda a: (abs(a - (count - wanted) / 2), a))
            return list(range(start, start + wanted)), {"chosen": "the middle"}
        changes = self.changes(model, path, starts, wanted, table, context)
        start = min(starts, key=lambda a: (changes[a], a))
        said = {f"{a} to {a + wanted - 1}": change for a, change in changes.items()}
        return list(range(start, start + wanted)), {"chosen": "least change", "changes": said}

    def changes(
        self, model: nn.Module, path: str, starts: Sequence[int], wanted: int, table: Sequence[int], context: Context
    ) -> dict[int, float]:
        """For the range from each start: its contribution's change since the last whole step, over the stream's norm.

        Root of the sums of squares, over all steps that reuse.
        """
        times = self.schedule()
        moved, size = dict.fromkeys(starts, 0.0), dict.fromkeys(starts, 0.0)
        calls = calls_at(context, times, input=self.input, rows=self.rows)
        last = 0
        for step, call in enumerate(calls):
            if not table[step]:
                last = step
                continue
            now, then = (streams(model, path, at_timestep(call, times[k], input=self.input)) for k in (step, last))
            for a in starts:
                change = (now[a + wanted] - now[a]) - (then[a + wanted] - then[a])
                moved[a] += float(change.square().sum())
                size[a] += float(now[a + wanted].square().sum())
            context.say(step + 1, len(calls), "comparing contributions")
        found = {a: (moved[a] / max(size[a], 1e-30)) ** 0.5 for a in starts}
        if any(value != value or value == float("inf") for value in found.values()):
            raise ToolchainError("the contribution of its blocks is not finite", where=path)
        return {a: six_digits(value) for a, value in found.items()}


def moved(modules: Sequence[str], path: str, blocks: Sequence[int], network: str) -> tuple[str, ...]:
    """Paths of modules where they are in one of the two networks: blocks are wrapped in one, and gone in the other."""
    found = []
    for module in modules:
        inside = next((block for block in blocks if is_within(module, f"{path}.{block}")), None)
        if inside is None:
            found.append(module)
        elif network == WHOLE:
            found.append(f"{path}.{inside}.block{module.removeprefix(f'{path}.{inside}')}")
    return tuple(found)


def reusing(facts: ReusedFacts) -> Program:
    """The program of a network that also gives what its blocks add, and of one that takes that in their place."""
    table = Table(input=facts.input, timesteps=facts.timesteps, ways=facts.table)
    return Program(
        networks={WHOLE: Network(gives=(REUSED,)), SHORT: Network()},
        ways=(Way(calls=(Call(network=WHOLE),)), Way(calls=(Call(network=SHORT),), reads=(REUSED,), otherwise=0)),
        table=table,
        states=(StateTensor(name=REUSED, shape=facts.shape, dtype=facts.dtype),),
    )


def longest(count: int, fixed: Mapping[int, str]) -> int:
    """The length of the longest range of blocks none of which must stay."""
    edges = [-1, *sorted(fixed), count]
    return max(b - a - 1 for a, b in pairwise(edges))


def costs(whole: int, short: int, table: Sequence[int]) -> dict[str, int]:
    """Multiply-accumulates of one step of each kind, and of all steps."""
    run = sum(short if reuses else whole for reuses in table)
    return {"whole_step": whole, "reusing_step": short, "run": run, "run_of_whole_steps": whole * len(table)}


def notes(whole: int, short: int, table: Sequence[int]) -> list[str]:
    """What a reader of the report should know."""
    run = costs(whole, short, table)
    return [
        f"{sum(table)} of {len(table)} steps reuse; a run takes {run['run'] / run['run_of_whole_steps']:.3f} of the "
        "multiply-accumulates of one in which every step runs whole",
        "a call apart from a run is a whole step: outputs and times of single calls are those of the whole network",
    ]


Form = list[Tensor]


def forms(model: nn.Module, stacks: Mapping[str, BlockStack], example: Inputs) -> tuple[dict[str, Form], int]:
    """What each stack's blocks were given and gave, on shapes where that is possible; and the call's cost.

    By stack that ran: the stream before the first block and after each; nothing where a block gives no tensor.
    """
    found: dict[str, Form] = {}
    looks: list[Look] = []
    for path, stack in stacks.items():

        def note(args: Any, named: Any, output: Any, path: str = path) -> None:
            seen = found.setdefault(path, [stream(args, named)])
            if isinstance(output, Tensor):
                seen.append(output)

        looks += [Look(block, after=note) for block in stack.blocks]
    with looking(looks):
        cost = macs(model, example)
    return {path: seen if len(seen) == len(stacks[path].blocks) + 1 else [] for path, seen in found.items()}, cost


def of_no_one_size(
    model: nn.Module, stacks: Mapping[str, BlockStack], found: Mapping[str, Form], example: Inputs, context: Context
) -> dict[str, str]:
    """Why stacks must run whole whose stream changes its shape with a size that a caller may change, by path.

    The tensor that is kept from step to step has one shape.
    """
    smaller, names = at_least_sizes(context.signature, example)
    if not names or not stacks:
        return {}
    try:
        seen, _ = forms(model, stacks, smaller)
    except Exception:
        return {}  # the model does not take these sizes, so nothing is known
    moved = [path for path in stacks if seen.get(path) and seen[path][0].shape[1:] != found[path][0].shape[1:]]
    said = f"its stream changes its shape with {', '.join(names)}, and what is reused has one: export it at fixed sizes"
    return dict.fromkeys(moved, said)


def at_least_sizes(signature: Signature, example: Inputs) -> tuple[Inputs, list[str]]:
    """A call cut to the smallest sizes that its inputs may have, the rows apart; and the names of these dimensions."""
    rows, call, names = rows_of(signature.inputs), dict(example), dict[str, None]()
    for spec in signature.inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, Dim) and dim != rows and spec.name in call and call[spec.name].shape[axis] > dim.low:
                call[spec.name] = call[spec.name].narrow(axis, 0, dim.low)
                names[dim.name] = None
    return call, list(names)


def why_not(seen: Form | None, rows: int) -> str:
    """Why a stack's blocks cannot be left out, given the streams around them; empty when they can."""
    if seen is None:
        return "the example call never reaches its blocks"
    if not seen:
        return "its blocks give something else than one stream each, once a call"
    if any(tensor.shape != seen[0].shape for tensor in seen):
        return "its blocks change the shape of the stream"
    if len(seen[0]) != rows:
        return f"its stream has {len(seen[0])} rows where the inputs have {rows}"
    return ""


def streams(model: nn.Module, path: str, call: Inputs) -> Form:
    """The stream before the first block of a stack and after each."""
    seen: Form = []

    def note(args: Any, named: Any, output: Tensor) -> None:
        seen.extend([output.double()] if seen else [stream(args, named).double(), output.double()])

    looks = [Look(block, after=note) for block in layer_at(model, path, BlockStack).blocks]
    with torch.no_grad(), evaluating(model), looking(looks):
        model(**call)
    return seen
