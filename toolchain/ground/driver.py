"""What runs a program: the one algorithm, over PyTorch modules and over engines, with arrays or with tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from enginewright.ground.errors import ToolchainError
from enginewright.ground.program import Call, Program, Way
from enginewright.ground.runner import Values, clock_of

Run = Callable[[Values], Values]
"""A network that is ready: named inputs -> named outputs."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a driver does with values of one kind, beside what numpy and PyTorch write alike.

    Args:
        join: rows of several in one.
        equal: whether two hold the same.
        copy: one that later writes into the first do not change.
        full: (another, shape, value, numpy's name of a type) -> one that holds the value everywhere, where another is.
    """

    join: Callable[[Sequence[Any]], Any]
    equal: Callable[[Any, Any], bool]
    copy: Callable[[Any], Any]
    full: Callable[[Any, tuple[int, ...], float, str], Any]


ARRAYS = Kind(join=np.concatenate, equal=np.array_equal, copy=np.copy, full=lambda _, *what: np.full(*what))
"""Of numpy."""


@dataclass
class Memory:
    """What a program keeps from call to call; one sampling run at a time.

    State tensors last from a call to the one after it, and only where that is of all rows at the next timestep of the
    schedule and of the same shapes; any other starts anew. Two calls at one timestep (guidance in two calls) leave
    nothing, because the next could be of either. Those of a sequence last until another starts.

    Args:
        states: what the last call left, by name.
        step: of the schedule, that the last call was at; None: of several, or there was none.
        shapes: of its inputs.
        again: whether it was at the same step as the call before.
        once: for networks that run once, what they were run with, and what they gave.
        seconds: for these, what each run took.
    """

    states: Values = field(default_factory=dict)
    step: int | None = None
    shapes: Any = None
    again: bool = False
    once: dict[str, tuple[Values, Values]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def move(self, steps: Collection[int], shapes: Any) -> None:
        """Go on to a call at these steps and of these shapes; drop what it may not reuse."""
        step = next(iter(steps)) if len(steps) == 1 else None
        self.again = step is None or step == self.step
        if step is None or self.step is None or step != self.step + 1 or shapes != self.shapes:
            self.states = {}
        self.step, self.shapes = step, shapes

    def keep(self, given: Values) -> None:
        """Note the state tensors that a call gave."""
        if given:
            self.states = {} if self.again else given


def some_rows(call: Mapping[str, Any], rows: Any, shared: Collection[str]) -> Values:
    """The same call, of tensors or arrays, for these rows only; what all rows share stays whole."""
    return {name: value if name in shared else value[rows] for name, value in call.items()}


def in_groups(
    calls: Sequence[Mapping[str, Any]], shared: Collection[str], of: int, join: Callable[[Sequence[Any]], Any]
) -> list[Values]:
    """As many calls, each with a multiple of so many rows: those of calls that follow it are put behind its own.

    Args:
        calls: of tensors or arrays.
        shared: inputs that all rows of a call share.
        of: rows that belong together.
        join: puts tensors or arrays behind one another.
    """
    found: list[Values] = []
    for number, call in enumerate(calls):
        rowed = {name: value.shape for name, value in call.items() if name not in shared}
        rows = next(iter(rowed.values()))[0] if rowed else of
        more = [calls[(number + i) % len(calls)] for i in range(of // math.gcd(rows, of))]
        alike = all(other[name].shape == shape for other in more for name, shape in rowed.items())
        parts = more if alike else [call] * len(more)
        joined = {name: join([part[name] for part in parts]) for name in rowed} if len(parts) > 1 else {}
        found.append({**call, **joined})
    return found


def some_input(program: Program, inputs: Values) -> Any:
    """An input that has a row for each sample."""
    return next(value for name, value in inputs.items() if name not in program.shared)


def first_states(program: Program, inputs: Values, kind: Kind) -> Values:
    """The state tensors that a sequence of a call's rows starts with."""
    like = some_input(program, inputs)
    return {s.name: kind.full(like, (len(like), *s.shape), s.first, s.dtype) for s in program.states}


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A program with its networks ready to run.

    Args:
        program: as it says.
        networks: ready, by name.
        memory: what it keeps.
        kind: of the values.
    """

    program: Program
    networks: Mapping[str, Run]
    memory: Memory = field(default_factory=Memory)
    kind: Kind = ARRAYS

    def __call__(self, inputs: Values) -> Values:
        """Named inputs with as many rows each, but for shared ones -> named outputs, rows in the same order."""
        program, table = self.program, self.program.table
        if table is None:
            if program.start:
                self.go_on(inputs)
            return self.follow(program.ways[0], inputs)
        steps = table.steps_of(inputs[table.input])
        self.memory.move(set(steps), tuple(sorted((name, tuple(value.shape)) for name, value in inputs.items())))
        chosen = [self.possible(table.ways[step]) for step in steps]
        if len(set(chosen)) == 1:
            return self.follow(program.ways[chosen[0]], inputs)
        parts: list[Values] = []
        order: list[int] = []
        for place in sorted(set(chosen)):
            own = [row for row, way in enumerate(chosen) if way == place]
            parts.append(self.follow(program.ways[place], some_rows(inputs, own, program.shared)))
            order += own
        back = np.argsort(order, kind="stable").tolist()
        return {name: self.kind.join([part[name] for part in parts])[back] for name in parts[0]}

    def go_on(self, inputs: Values) -> None:
        """Start a sequence, with state tensors at their first values, or see that there is one to go on with.

        Raises:
            ToolchainError: there is none, or it has another number of rows.
        """
        program = self.program
        if not inputs[program.start].any():
            self.memory.states = first_states(program, inputs, self.kind)
            return
        rows = len(some_input(program, inputs))
        kept = {len(self.memory.states[state.name]) for state in program.states if state.name in self.memory.states}
        if kept != {rows}:
            there = f"the one before has {kept.pop()}" if kept else "there is none before"
            raise ToolchainError(
                f"a call with {program.start} > 0 goes on with a sequence of {rows} rows, and {there}",
                help=f"start one by a call with {program.start} = 0",
            )

    def possible(self, place: int) -> int:
        """The way at a place; or the one instead of it, where it reads a state tensor that is missing."""
        way = self.program.ways[place]
        return place if all(name in self.memory.states for name in way.reads) else way.otherwise

    def follow(self, way: Way, inputs: Values) -> Values:
        """Go one way. An input that the call leaves out is left out for the networks too: they may do without."""
        known = {**inputs, **{name: self.memory.states[name] for name in way.reads}}
        kept: Values = {}
        outputs: Values = {}
        for call in way.calls:
            takes, gives = self.program.networks[call.network].takes, self.program.given_by(call.network)
            given = dict(known) if takes is None else {name: known[name] for name in takes if name in known}
            outputs = dict(self.once(call, given) if call.once else self.networks[call.network](given))
            kept |= {name: self.kept(name, outputs.pop(output), inputs) for output, name in gives.items()}
            known |= outputs
        self.memory.keep(kept)
        return outputs

    def kept(self, name: str, given: Any, inputs: Values) -> Any:
        """A state tensor after a call: what was given for it, or that written into what there was.

        Raises:
            ToolchainError: a sequence has become longer than the tensor.
        """
        state = next(state for state in self.program.states if state.name == name)
        if not state.grows:
            return given
        whole, place = self.memory.states[name], int(inputs[self.program.start])
        end = place + given.shape[state.grows]
        if end > whole.shape[state.grows]:
            raise ToolchainError(
                f"the sequence would have {end} entries in {name!r}, which has room for {whole.shape[state.grows]}",
                help=f"start another by a call with {self.program.start} = 0",
            )
        whole[(*[slice(None)] * state.grows, slice(place, end))] = given
        return whole

    def once(self, call: Call, given: Values) -> Values:
        """What a network gives that runs only where its inputs are not what they were.

        They are compared by content, with copies: a caller may write new values into the arrays it gave before.
        """
        before = self.memory.once.get(call.network)
        if before and all(self.kind.equal(before[0][name], given[name]) for name in call.once):
            return before[1]
        network = self.networks[call.network]
        clock = clock_of(network)
        began = clock()
        outputs = dict(network(given))
        self.memory.seconds.setdefault(call.network, []).append(clock() - began)
        self.memory.once[call.network] = {name: self.kind.copy(given[name]) for name in call.once}, outputs
        return outputs

    def first_non_finite(self, inputs: Values) -> str:
        """What the first network says that can tell where its values stop being finite; empty where none can."""
        found: list[str] = []

        def asking(name: str, run: Run) -> Run:
            def ask(given: Values) -> Values:
                locate = getattr(run, "first_non_finite", None)
                if not found and locate and (said := locate(given)):
                    found.append(str(said))
                return run(given)

            return ask

        asked = {name: asking(name, run) for name, run in self.networks.items()}
        Driver(program=self.program, networks=asked, kind=self.kind)(inputs)
        return found[0] if found else ""
