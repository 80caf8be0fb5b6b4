"""A model that is several networks: PyTorch's side of a program. A model that is one network is a program of one.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from enginewright.ground.driver import Driver, Kind, Memory, first_states
from enginewright.ground.errors import ToolchainError
from enginewright.ground.program import SOLE, Hoisted, Program, Table, by_timestep
from enginewright.ground.runner import Values
from enginewright.passes.kernel.on_shapes import on_shapes
from enginewright.passes.kernel.selection import is_within

TENSORS = Kind(
    join=lambda parts: torch.cat(list(parts)),
    equal=torch.equal,
    copy=torch.clone,
    full=lambda like, shape, value, dtype: torch.full(shape, value, dtype=getattr(torch, dtype), device=like.device),
)
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
            network, declared = self.networks[name or ONLY], self.program.networks[name]

            def run(given: Values) -> Values:
                output, states = network(**given), {}
                if gives := self.program.given_by(name):
                    output, *kept = output
                    states = dict(zip(gives, (each.detach() for each in kept), strict=True))
                leaves, form = pytree.tree_flatten(output)
                forms.append(form)
                names = declared.outputs or [str(place) for place, _ in enumerate(leaves)]
                return {**dict(zip(names, leaves, strict=True)), **states}

            return run

        networks = {name: ready(name) for name in self.program.networks}
        memory = Memory() if any(map(lacks_values, inputs.values())) else self.memory
        found = Driver(program=self.program, networks=networks, memory=memory, kind=TENSORS)(inputs)
        return pytree.tree_unflatten(list(found.values()), forms[-1])


def lacks_values(tensor: Tensor) -> bool:
    """Whether a tensor has a shape alone: nothing computed from it may be kept for later calls."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


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
    """The network of a model that has one, and its path in the model.

    Raises:
        ToolchainError: it has several.
    """
    networks = networks_of(model)
    if len(networks) > 1:
        raise ToolchainError(f"the model is {len(networks)} networks ({', '.join(networks)}), and this is done to one")
    [(name, network)] = networks.items()
    return network, place_of(model, name)


def each_network(model: nn.Module, change: Callable[[nn.Module, str], nn.Module]) -> nn.Module:
    """A model changed as a whole (how it is called, what it gives), or each of its networks.

    Engines are made of the networks one by one, so what is put around all of them would be lost there.

    Args:
        model: changed in place.
        change: (network, its name in the program) -> the changed network.
    """
    if not isinstance(model, Networks):
        return change(model, "")
    for name, network in networks_of(model).items():
        model.networks[name or ONLY] = change(network, name)
    return model


def called_by(model: nn.Module, program: Program) -> nn.Module:
    """A model whose networks are called as another program says, in place; those that it lacks are gone."""
    if isinstance(model, Networks):
        for name in model.program.networks.keys() - program.networks.keys():
            del model.networks[name or ONLY]
        model.program = program
    return model


def given_beside(program: Program, network: str, names: Sequence[str], read: Collection[str]) -> list[str]:
    """Which of some added inputs a network is given: those that it reads, or all where it takes all of a call.

    Args:
        program: how the networks are called.
        network: its name.
        names: of the inputs.
        read: those that something in the network reads.
    """
    takes = program.networks[network].takes
    return [each for each in names if takes is None or each in read]


def taking(program: Program, added: Mapping[str, Sequence[str]]) -> Program:
    """A program whose networks, by name, take some inputs more; those that take all of a call take these too."""
    networks = {
        name: own if own.takes is None else replace(own, takes=(*own.takes, *added.get(name, ())))
        for name, own in program.networks.items()
    }
    return replace(program, networks=networks)


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


def given_to(
    model: nn.Module, name: str, call: Mapping[str, Tensor], *, shapes_alone: bool = False
) -> dict[str, Tensor]:
    """What a call of a model gives to one of its networks: at a timestep at which that network runs.

    State tensors are those that a sequence starts with; those of a schedule are left out, because a network that may
    read them runs without.

    Args:
        model: whose network it is.
        name: of the network.
        call: of the model.
        shapes_alone: give zeros for what other networks give, and run none of them: no weight is read.
    """
    program = program_of(model)
    time = program.time_of(name)
    if program.table is not None and time is not None:
        call = at_timestep(call, time, input=program.table.input)
    if program.start:
        call = {**call, **first_states(program, dict(call), TENSORS)}
    if not isinstance(model, Networks) or program.networks[name].takes is None:
        return dict(call)
    seen: list[dict[str, Tensor]] = []
    hook = model.networks[name].register_forward_pre_hook(
        lambda _, args, given: seen.append(dict(given)), with_kwargs=True
    )
    try:
        with torch.no_grad(), on_shapes(model) if shapes_alone else nullcontext():
            model(**call)
    finally:
        hook.remove()
    if not shapes_alone:
        return seen[0]
    return {
        key: call[key] if key in call else torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)
        for key, t in seen[0].items()
    }


def without_inputs(model: nn.Module, names: Collection[str], *, gone: Collection[str] = ()) -> nn.Module:
    """A model that takes some inputs no more: neither its networks do, nor do these stay the same over a run.

    Args:
        model: changed in place.
        names: of inputs, and of what networks give to others.
        gone: names of networks that are left out.
    """
    if not isinstance(model, Networks):
        return model
    program = model.program

    def left(some: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(each for each in some if each not in names)

    networks = {
        name: own if own.takes is None else replace(own, takes=left(own.takes))
        for name, own in program.networks.items()
        if name not in gone
    }
    ways = tuple(
        replace(way, calls=tuple(replace(c, once=left(c.once)) for c in way.calls if c.network not in gone))
        for way in program.ways
    )
    hoisted = {
        name: replace(found, constant=constant)
        for name, found in program.hoisted.items()
        if name not in gone and (constant := left(found.constant))
    }
    inner = tuple(spec for spec in program.inner if spec.name not in names)
    return called_by(model, replace(program, networks=networks, ways=ways, hoisted=hoisted, inner=inner))


def local(paths: Mapping[str, Any], network: str) -> dict[str, Any]:
    """Entries by module path that lie in one network, by their paths from there."""
    if not network:
        return dict(paths)
    return {
        path.removeprefix(network).removeprefix("."): entry for path, entry in paths.items() if is_within(path, network)
    }
