"""A program: several networks that answer one call together, and what they keep from call to call.

It is data alone. What runs it over PyTorch modules and over engines is ``driver.py`` beside this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import InputSpec, read_spec

SCHEMA = 1
"""Of programs as they are written."""

PREPARE, STEP = "prepare", "step"
"""Names of the two networks that one becomes of which some work is done once."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of a program.

    Args:
        takes: names of its inputs; None stands for those of the program and the state tensors of the way.
        gives: names of the state tensors that it gives beside its outputs, after them and in this order.
        outputs: names of its outputs; None stands for those of the program.
    """

    takes: tuple[str, ...] | None = None
    gives: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """A network that runs on a way.

    Args:
        network: its name.
        once: inputs; while they stay what they are it is not run again. Empty: it runs in every call.
    """

    network: str
    once: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way through the networks: each reads the call's inputs, what those before it gave, and state tensors.

    Args:
        calls: in order; the last one's outputs are the program's.
        reads: state tensors without which this way cannot be gone.
        otherwise: the way that is gone where they are missing, by its place in the program.
    """

    calls: tuple[Call, ...]
    reads: tuple[str, ...] = ()
    otherwise: int = 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Which way a row of a call goes, by its timestep.

    Args:
        input: holds the timestep, one for each row, or one for all.
        timesteps: the sampler's schedule, in its order; a timestep beside it takes the nearest.
        ways: for each of them the way, by its place in the program.
    """

    input: str
    timesteps: tuple[float, ...]
    ways: tuple[int, ...]

    def steps_of(self, values: Any) -> list[int]:
        """For each row the step of the schedule whose timestep is nearest to its own; arrays or tensors, (B,) or ()."""
        times = np.asarray(values.tolist(), np.float32).reshape(-1)
        schedule = np.asarray(self.timesteps, np.float32)
        found: list[int] = np.abs(times[:, None] - schedule).argmin(axis=1).tolist()
        return found


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """A value that a call leaves for the next step: of a schedule, or of a sequence.

    Args:
        name: of the input that takes it.
        shape: of one row.
        dtype: its type, numpy's name.
        first: every element, in the call that starts a sequence; of a program with ``start``.
        given_as: name of the output that gives it; empty: that of the input.
        grows: axis, counted with the rows' own, along which the output holds new entries alone: they are written into
            the tensor where ``start`` of the program says, and nothing of it is copied; 0: the output is all of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    first: float = 0.0
    given_as: str = ""
    grows: int = 0

    @property
    def output(self) -> str:
        """The name of the output that gives it."""
        return self.given_as or self.name


@dataclass(frozen=True, kw_only=True)
class Hoisted:
    """What of a network is to be done once for a run, so that it is exported as two.

    Args:
        constant: inputs that stay the same over a run.
        modules: paths, in the network, of outermost modules that read nothing else.
    """

    constant: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """Networks and the ways through them.

    Args:
        networks: by name; the name tells their files apart, and is empty for a network that is alone.
        ways: the ways that a call may go.
        table: which of them, by timestep; None: there is one.
        states: what is kept from one step to the next.
        shared: inputs that have no row for each sample: every network gets the whole of them.
        hoisted: networks of which some work is to be done once; before they are exported, and none afterwards.
        inner: what networks give to others, as inputs of those.
        start: input that is zero in the call that starts a sequence, and greater in those that go on with it; empty:
            state tensors are of steps of the table's schedule.
    """

    networks: Mapping[str, Network]
    ways: tuple[Way, ...]
    table: Table | None = None
    states: tuple[StateTensor, ...] = ()
    shared: tuple[str, ...] = ()
    hoisted: Mapping[str, Hoisted] = field(default_factory=dict)
    inner: tuple[InputSpec, ...] = ()
    start: str = ""

    def calls_of(self, network: str) -> Iterator[tuple[Way, Call]]:
        """Where a network is called."""
        return ((way, call) for way in self.ways for call in way.calls if call.network == network)

    def read_by(self, network: str) -> tuple[StateTensor, ...]:
        """The state tensors that a network may read."""
        names = {name for way, _ in self.calls_of(network) for name in way.reads}
        takes = self.networks[network].takes
        return tuple(s for s in self.states if s.name in names and (takes is None or s.name in takes))

    def given_by(self, network: str) -> dict[str, str]:
        """Names of the outputs of a network that give state tensors, after its others, each with the tensor's name."""
        states = {state.name: state for state in self.states}
        return {states[name].output: name for name in self.networks[network].gives}

    def part_of(self, network: str, part: str) -> str:
        """The name of one of the two networks that a network becomes of which some work is done once."""
        return f"{network}-{part}" if len(self.networks) > 1 else part

    def time_of(self, network: str) -> float | None:
        """A timestep at which a network runs; None where it runs at any."""
        if self.table is None:
            return None
        own = {place for place, way in enumerate(self.ways) if any(call.network == network for call in way.calls)}
        return next(time for time, way in zip(self.table.timesteps, self.table.ways, strict=True) if way in own)

    def as_json(self) -> dict[str, Any]:
        """The program as JSON can hold it."""
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(content: Any, *, where: str) -> Program:
        """Read what ``as_json`` gave.

        Raises:
            ToolchainError: it is no program, or one whose parts do not fit one another.
        """
        try:
            program = read(content)
            check(program)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as cause:
            said = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
            raise ToolchainError(f"the program cannot be read: {said}", where=where, help="export again") from cause
        return program


SOLE = Program(networks={"": Network()}, ways=(Way(calls=(Call(network=""),)),))
"""The program of one network."""


def in_turn(networks: Mapping[str, Network], inner: Sequence[InputSpec]) -> Program:
    """The program of networks that run one after the other in every call.

    Args:
        networks: in order; each says what it takes, and all but the last what they give.
        inner: what they give to one another.
    """
    return Program(
        networks=networks, ways=(Way(calls=tuple(Call(network=name) for name in networks)),), inner=tuple(inner)
    )


def by_timestep(networks: Sequence[str], table: Table, *, shared: Sequence[str] = ()) -> Program:
    """The program of networks each of which is a way of its own, chosen by timestep."""
    ways = tuple(Way(calls=(Call(network=name),)) for name in networks)
    return Program(networks={name: Network() for name in networks}, ways=ways, table=table, shared=tuple(shared))


def parted(program: Program, halves: Mapping[str, tuple[Network, Network]]) -> Program:
    """The program in which some networks are two: one that runs once for a run, and one that runs in every call.

    Args:
        program: before.
        halves: for each of those networks what its first part takes and gives, and what the second takes.
    """

    def calls(call: Call) -> tuple[Call, ...]:
        if call.network not in halves:
            return (call,)
        first, _ = halves[call.network]
        once = Call(network=program.part_of(call.network, PREPARE), once=first.takes or ())
        return once, replace(call, network=program.part_of(call.network, STEP))

    networks: dict[str, Network] = {}
    for name, network in program.networks.items():
        if name in halves:
            first, second = halves[name]
            networks[program.part_of(name, PREPARE)] = first
            networks[program.part_of(name, STEP)] = replace(second, gives=network.gives, outputs=network.outputs)
        else:
            networks[name] = network
    ways = tuple(replace(way, calls=tuple(new for call in way.calls for new in calls(call))) for way in program.ways)
    return replace(program, networks=networks, ways=ways, hoisted={})


def read(content: Any) -> Program:
    """A program out of parsed JSON; raises what Python raises where it is none."""
    if content["schema"] != SCHEMA:
        raise ValueError(f"it has schema {content['schema']!r}; this version reads {SCHEMA}")

    def names(values: Any) -> tuple[str, ...]:
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError("a name that is no text")
        return tuple(values)

    def all_or(values: Any) -> tuple[str, ...] | None:
        return None if values is None else names(values)

    networks = {
        name: Network(takes=all_or(entry["takes"]), gives=names(entry["gives"]), outputs=all_or(entry.get("outputs")))
        for name, entry in content["networks"].items()
    }
    ways = tuple(
        Way(
            calls=tuple(Call(network=each["network"], once=names(each["once"])) for each in entry["calls"]),
            reads=names(entry["reads"]),
            otherwise=entry["otherwise"],
        )
        for entry in content["ways"]
    )
    table = content["table"] and Table(
        input=content["table"]["input"],
        timesteps=tuple(content["table"]["timesteps"]),
        ways=tuple(content["table"]["ways"]),
    )
    states = tuple(StateTensor(**{**entry, "shape": tuple(entry["shape"])}) for entry in content["states"])
    return Program(
        networks=networks,
        ways=ways,
        table=table or None,
        states=states,
        shared=names(content["shared"]),
        inner=tuple(read_spec(entry) for entry in content.get("inner", ())),
        start=content.get("start", ""),
    )


def check(program: Program) -> None:
    """Raise ``ValueError`` for a program whose parts do not fit one another."""
    for name in program.networks:
        if not isinstance(name, str) or any(sign in name for sign in "/\\\0") or name in (".", ".."):
            raise ValueError(f"a network cannot be called {name!r}")
        if not any(program.calls_of(name)):
            raise ValueError(f"network {name!r} is on no way")
    kept = {state.name for state in program.states}
    if not all(kept.issuperset(network.gives) for network in program.networks.values()):
        raise ValueError("a network that gives a state tensor that there is not")
    for way in program.ways:
        if not way.calls or any(call.network not in program.networks for call in way.calls):
            raise ValueError("a way through networks that there are not")
        if not set(way.reads) <= kept:
            raise ValueError("a way that reads a state tensor that there is not")
        if type(way.otherwise) is not int or not 0 <= way.otherwise < len(program.ways):
            raise ValueError("a way that is not there")
        if way.reads and not program.start and program.ways[way.otherwise].reads:
            raise ValueError("a way that reads a state tensor has no other that reads none")
    for state in program.states:
        np.dtype(state.dtype)
        if not isinstance(state.first, int | float) or not isinstance(state.given_as, str):
            raise ValueError("a state tensor whose first value is no number, or that is given as what is no text")
        if not isinstance(state.name, str) or not all(type(size) is int and 0 < size < 2**40 for size in state.shape):
            raise ValueError("a state tensor without name or shape")
        if (
            type(state.grows) is not int
            or not 0 <= state.grows <= len(state.shape)
            or (state.grows and not program.start)
        ):
            raise ValueError("a state tensor that grows along no axis, or in no sequence")
    check_inner(program)
    if not isinstance(program.start, str) or (program.start and program.table is not None):
        raise ValueError("steps both of a sequence and of a schedule")
    if program.table is None:
        if len(program.ways) != 1:
            raise ValueError("several ways and no table of timesteps")
        return
    table = program.table
    if not isinstance(table.input, str) or not table.timesteps or len(table.timesteps) != len(table.ways):
        raise ValueError("no table of timesteps")
    if not all(isinstance(time, int | float) for time in table.timesteps):
        raise ValueError("a timestep that is no number")
    if not all(type(way) is int and 0 <= way < len(program.ways) for way in table.ways):
        raise ValueError("a table of ways that there are not")


def check_inner(program: Program) -> None:
    """Raise ``ValueError`` where a network takes what one gives that does not run before it."""
    inner = {spec.name for spec in program.inner}
    for way in program.ways:
        known: set[str] = set()
        for call in way.calls:
            network = program.networks[call.network]
            if missing := inner.intersection(network.takes or ()) - known:
                raise ValueError(f"network {call.network!r} takes {min(missing)!r}, which none before it gives")
            known |= set(network.outputs or ())
    for spec in program.inner:
        np.dtype(spec.dtype)
        if not isinstance(spec.name, str):
            raise ValueError("a name that is no text")
