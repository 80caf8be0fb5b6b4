"""A model that is several networks: PyTorch's side of a program. A model that is one network is a program of one.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from enginewright.ground.driver import Driver, Kind, Memory, Values
from enginewright.ground.program import SOLE, Hoisted, Program, Table, by_timestep
from enginewright.passes.kernel.selection import is_within

TENSORS = Kind(join=lambda parts: torch.cat(list(parts)), equal=torch.equal, copy=torch.clone)
"""Of PyTorch."""

ONLY = "model"
"""The child that holds a network which is alone in its program."""


class Networks(nn.Module):
    """Runs several networks as their program says; called by name, as each of them is.

    What it keeps from call to call serves one sampling run at a time.

    Args:
        networks: by their names in the program.
        program: as it is before some networks are parted in two, which is done when they are exported.
    """

    def __init__(self, networks: Mapping[str, nn.Module], program: Program) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name or ONLY: network for name, network in networks.items()})
        self.program, self.memory = program, Memory()

    def forward(self, **inputs: Tensor) -> Any:
        """Inputs by name, with B rows but for the shared ones -> what the networks give."""
        forms: list[Any] = []

        def ready(name: str) -> Callable[[Values], Values]:
            network, gives = self.networks[name or ONLY], self.program.networks[name].gives

            def run(given: Values) -> Values:
                output = network(**given)
                states = dict(zip(gives, (each.detach() for each in output[1:]), strict=True)) if gives else {}
                leaves, form = pytree.tree_flatten(output[0] if gives else output)
                forms.append(form)
                return {**{str(place): leaf for place, leaf in enumerate(leaves)}, **states}

            return run

        networks = {name: ready(name) for name in self.program.networks}
        found = Driver(program=self.program, networks=networks, memory=self.memory, kind=TENSORS)(inputs)
        return pytree.tree_unflatten(list(found.values()), forms[-1])


def program_of(model: nn.Module) -> Program:
    """The program of a model, which is that of one network where it says nothing else."""
    return model.program if isinstance(model, Networks) else SOLE


def networks_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's networks by their names in its program."""
    if not isinstance(model, Networks):
        return {"": model}
    return {name: model.networks[name or ONLY] for name in model.program.networks}


def place_of(model: nn.Module, name: str) -> str:
    """The path of a network in its model."""
    return f"networks.{name or ONLY}" if isinstance(model, Networks) else ""


def only_network(model: nn.Module) -> tuple[nn.Module, str]:
    """The network of a model that has one, and its path in the model."""
    [(name, network)] = networks_of(model).items()
    return network, place_of(model, name)


def each_network(model: nn.Module, change: Callable[[nn.Module, str], nn.Module]) -> nn.Module:
    """A model changed as a whole (how it is called, what it gives), or each of its networks.

    Engines are made of the networks one by one, so what is put around all of them would be lost there.

    Args:
        model: changed in place.
        change: (network, path of it in the model) -> the changed network.
    """
    if not isinstance(model, Networks):
        return change(model, "")
    for name, network in networks_of(model).items():
        model.networks[name or ONLY] = change(network, place_of(model, name))
    return model


def switched(
    model: nn.Module, networks: Mapping[str, nn.Module], table: Table, *, shared: Sequence[str] = ()
) -> Networks:
    """Networks chosen by timestep in the place of a model's only one; what was to be done once of that still is."""
    once = list(program_of(model).hoisted.values())
    program = by_timestep(list(networks), table, shared=shared)
    program = replace(program, hoisted={name: found for name in networks for found in once})
    return Networks(networks, program).train(model.training)


def hoist(model: nn.Module, found: Mapping[str, Hoisted]) -> Networks:
    """A model that computes what it did, of whose networks some are exported as two."""
    program = replace(program_of(model), hoisted=dict(found))
    return Networks(networks_of(model), program).train(model.training)


def at_timestep(call: Mapping[str, Tensor], time: float, *, input: str) -> dict[str, Tensor]:
    """A call with another timestep in the input that holds it, the same for every row."""
    return {**call, input: torch.full_like(call[input], time)}


def at_its_time(model: nn.Module, name: str, call: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A call of one network of a model: at a timestep at which that network runs."""
    program = program_of(model)
    time = program.time_of(name)
    if program.table is None or time is None:
        return dict(call)
    return at_timestep(call, time, input=program.table.input)


def without_inputs(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A model that takes some inputs no more: they are none of those that stay the same over a run."""
    if isinstance(model, Networks):
        hoisted = {}
        for name, found in model.program.hoisted.items():
            if left := tuple(each for each in found.constant if each not in names):
                hoisted[name] = replace(found, constant=left)
        model.program = replace(model.program, hoisted=hoisted)
    return model


def local(paths: Mapping[str, Any], network: str) -> dict[str, Any]:
    """Entries by module path that lie in one network, by their paths from there."""
    if not network:
        return dict(paths)
    return {
        path.removeprefix(network).removeprefix("."): entry for path, entry in paths.items() if is_within(path, network)
    }
