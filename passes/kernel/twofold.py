"""Programs that answer every row of a call in two ways at once: with a condition and without, plain and perturbed.

Networks in which the two begin to differ run for both, and so do all that read what those give. What goes from one to
another, or is kept for the next call, then holds both ways of a row, one after the other: (B, ...) becomes
(B, 2, ...), so that a row stays a row, and each way has a state of its own. The networks that give the result put the
two together.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from enginewright.ground.errors import ToolchainError
from enginewright.ground.program import Program, StateTensor
from enginewright.ground.signature import InputSpec, shared_by_rows


@dataclass(frozen=True, kw_only=True)
class Twofold:
    """One network of such a program.

    Args:
        both: its inputs that hold both ways of each row.
        shared: its inputs from other networks that have no row for each sample.
        ends: whether its output is the program's.
        states: whether it gives state tensors after its output.
    """

    both: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    ends: bool = True
    states: bool = False

    def one_way(self, inputs: Mapping[str, Any], way: int) -> dict[str, Any]:
        """The inputs of one of the two ways, 0 or 1."""
        return {name: value[:, way] if name in self.both else value for name, value in inputs.items()}

    def rows(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that hold both ways as twice the rows: all of the first way, and after them all of the second.

        One that is left out stays out: a state tensor of a schedule may be missing.
        """
        return {name: inputs[name].transpose(0, 1).flatten(0, 1) for name in self.both if name in inputs}

    def answer(self, one: Any, other: Any, together: Callable[[Any, Any], Any]) -> Any:
        """What the network gives, of what it gave in either way; ``together`` makes one result of two."""
        if not self.ends:
            return pytree.tree_map(beside, one, other)
        if not self.states:
            return together(one, other)
        return together(one[0], other[0]), *map(beside, one[1:], other[1:])


ALONE = Twofold()
"""A network that gets nothing from others and gives the result."""


def beside(one: Tensor, other: Tensor) -> Tensor:
    """Both ways of each row: (B, ...) twice -> (B, 2, ...)."""
    return torch.stack([one, other], dim=1)


def twofold(program: Program, begins: Collection[str], *, what: str) -> tuple[dict[str, Twofold], Program]:
    """The networks of a program that run in two ways, by name, and how they are then called.

    Args:
        program: before.
        begins: networks in which the two ways differ though their inputs do not.
        what: makes the difference, for errors.

    Raises:
        ToolchainError: it never reaches the result; or a network that it reaches gives a value without rows, or gives
            the result and what others read.
    """
    last = {way.calls[-1].network for way in program.ways}
    alike = {*program.shared, *shared_by_rows(program.inner)}
    found, both = set(begins), set[str]()
    while True:
        both = {name for network in found for name in passed_by(program, network, last)}
        more = {name for name in program.networks if both & {*reads(program, name), *passed_by(program, name, last)}}
        if more <= found:
            break
        found |= more
    refuse(program, found, both & alike, last, what)
    inner = tuple(doubled(spec) if spec.name in both else spec for spec in program.inner)
    states = tuple(doubled_state(state) if state.name in both else state for state in program.states)
    parts = {
        name: Twofold(
            both=tuple(each for each in reads(program, name) if each in both),
            shared=tuple(each for each in program.networks[name].takes or () if each in alike),
            ends=name in last,
            states=bool(program.networks[name].gives),
        )
        for name in program.networks
        if name in found
    }
    return parts, replace(program, inner=inner, states=states)


def passed_by(program: Program, network: str, last: set[str]) -> tuple[str, ...]:
    """What a network gives to others or leaves for the next call: not the result."""
    own = program.networks[network]
    return (*(() if network in last else own.outputs or ()), *own.gives)


def reads(program: Program, network: str) -> tuple[str, ...]:
    """What a network takes that others or the call before may have given."""
    takes = program.networks[network].takes
    return tuple(state.name for state in program.read_by(network)) if takes is None else takes


def refuse(program: Program, found: set[str], without_rows: set[str], last: set[str], what: str) -> None:
    """Raise where two ways of a row have no meaning."""
    if found and not last & found:
        raise ToolchainError(f"{what} never reaches the result: {', '.join(sorted(last))} would give it unchanged")
    if without_rows:
        raise ToolchainError(
            f"{what} decides {min(without_rows)!r}, which all rows share, so that it cannot differ for a row"
        )
    taken = {name for own in program.networks.values() for name in own.takes or ()}
    for name in sorted(last & found):
        if given := taken.intersection(program.networks[name].outputs or ()):
            raise ToolchainError(
                f"network {name} gives the result, where the two are put together, and also {min(given)!r} to others, "
                "which would need both"
            )


def doubled(spec: InputSpec) -> InputSpec:
    """A value that holds both ways of each row."""
    return replace(spec, shape=(*spec.shape[:1], 2, *spec.shape[1:]))


def doubled_state(state: StateTensor) -> StateTensor:
    """A state tensor of both ways of each row."""
    return replace(state, shape=(2, *state.shape), grows=state.grows and state.grows + 1)
