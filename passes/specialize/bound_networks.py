"""Bound inputs in a model of several networks: what each of them holds, and networks that give constants alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from enginewright.ground.errors import ToolchainError
from enginewright.ground.program import Network
from enginewright.ground.signature import shared_by_rows
from enginewright.passes.contract import Inputs
from enginewright.passes.networks import given_to, networks_of, program_of
from enginewright.passes.specialize.binding import Bound, placed


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One network that stays.

    Args:
        given: what it is given in the call that is followed, constants and all.
        held: those constants, as it holds them.
    """

    given: Inputs
    held: Mapping[str, Bound]


@dataclass(frozen=True, kw_only=True)
class BoundNetworks:
    """The networks of a model of which some inputs are bound.

    Args:
        constant: networks that take constants alone, by name, and what each gives, by name: of one row, or whole where
            rows share it.
        others: those that stay.
    """

    constant: Mapping[str, Mapping[str, Tensor]]
    others: Mapping[str, Holding]


def bound_networks(
    model: nn.Module, call: Inputs, bound: Mapping[str, Bound], shared: Collection[str]
) -> BoundNetworks:
    """Follow bound inputs from network to network.

    Args:
        model: is called.
        call: with the constants.
        bound: inputs of the whole model.
        shared: inputs that have no row for each sample.

    Raises:
        ToolchainError: a network would be left without rows, or a constant one gives the result or a state.
    """
    program = program_of(model)
    alike = {*shared, *program.shared, *shared_by_rows(program.inner)}
    constant = constant_networks(model, {name: call[name] for name in bound})
    passed = {name: value for outputs in constant.values() for name, value in outputs.items()}
    others = {}
    for name, own in program.networks.items():
        if name in constant:
            continue
        given = given_to(model, name, call)
        held = bound if own.takes is None else held_by(name, own, given, bound, passed, alike)
        others[name] = Holding(given=given, held=held)
    cut = {
        name: {each: value if each in alike else value[0] for each, value in outputs.items()}
        for name, outputs in constant.items()
    }
    return BoundNetworks(constant=cut, others=others)


def constant_networks(model: nn.Module, known: Inputs) -> dict[str, dict[str, Tensor]]:
    """Networks that take these constants, or what other such networks give, and no more; with what each gives."""
    program, networks = program_of(model), networks_of(model)
    known, found = dict(known), dict[str, dict[str, Tensor]]()
    last = {way.calls[-1].network for way in program.ways}

    def next_one() -> tuple[str, tuple[str, ...]] | None:
        left = ((name, own.takes) for name, own in program.networks.items() if name not in found)
        return next(((n, takes) for n, takes in left if takes is not None and known.keys() >= set(takes)), None)

    while (ready := next_one()) is not None:
        name, takes = ready
        if name in last or program.networks[name].gives:
            gives = "the result" if name in last else f"the state {program.networks[name].gives[0]}"
            raise ToolchainError(
                f"network {name} takes {', '.join(takes)} alone: bound, it would give {gives} for good"
            )
        with torch.no_grad():
            leaves = pytree.tree_leaves(networks[name](**{each: known[each] for each in takes}))
        found[name] = dict(zip(program.networks[name].outputs or (), leaves, strict=True))
        known |= found[name]
    return found


def held_by(
    name: str, own: Network, given: Inputs, bound: Mapping[str, Bound], passed: Inputs, alike: Collection[str]
) -> dict[str, Bound]:
    """The constants of a network that says what it takes, placed beside what else it takes."""
    held = [each for each in own.takes or () if each in bound or each in passed]
    kept = {each: value for each, value in given.items() if each not in held}
    if held and not any(value.ndim and each not in alike for each, value in kept.items()):
        raise ToolchainError(
            f"network {name} takes {', '.join(held)} and nothing else that has a row for each sample, so that it could "
            "not tell how many there are",
            help="leave an input of it that differs from row to row",
        )
    found = {}
    for each in held:
        others = {other: value for other, value in kept.items() if (other in alike) == (each in alike)}
        if each in bound:
            row = torch.tensor(bound[each].value)
            most = given[each].ndim - row.ndim if others else 0
            found[each] = placed(bound[each].value, given[each], others or kept, most=most)
        else:
            value = passed[each] if each in alike else passed[each][0]
            found[each] = placed(value, given[each], others or kept, most=0 if each in alike else 1)
    return found
