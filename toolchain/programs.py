"""A program on disk: ``program.json`` and a graph for each network; and the engines of one target as one runner.

Graphs lie side by side, not in a folder each: networks by timestep share most of their weights, and ONNX reads no
weights from outside a graph's folder. An artifact without ``program.json`` has one network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from enginewright.added import with_inputs
from enginewright.ground.driver import Driver
from enginewright.ground.errors import ToolchainError
from enginewright.ground.program import PREPARE, SOLE, STEP, Network, Program, parted
from enginewright.ground.reading import read_json
from enginewright.ground.runner import Runner, Values, clock_of, device_of, to_device_of
from enginewright.ground.signature import Arrays
from enginewright.passes.contract import NewInput
from enginewright.passes.kernel.graph_module import GraphModule
from enginewright.passes.networks import TENSORS
from enginewright.recipe import TargetStep
from enginewright.sources.contract import Model
from enginewright.targets.contract import ShapeRange
from enginewright.targets.devices import holds_tensors, on_host
from enginewright.targets.split_graph import split_graph
from enginewright.targets.weights import load_graph
from enginewright.validation.inputs import draw
from enginewright.validation.sizes import Sizes, at_limits

FILE = "program.json"

BEFORE = ("engines.json", "prepared.json")
"""What said of several networks in artifacts of version 0.1.0."""


def suffix(network: str) -> str:
    """What the files and folders of a network are told apart by."""
    return f"-{network}" if network else ""


def graph_of(folder: Path, network: str) -> Path:
    """The graph of a network in an artifact."""
    return folder / f"model{suffix(network)}.onnx"


def part_in_two(program: Program, folder: Path) -> Program:
    """Write two graphs in the place of each network of which some work is to be done once; the program of all graphs.

    Raises:
        ToolchainError: nothing in a graph can be done once for a run.
    """
    halves: dict[str, tuple[Network, Network]] = {}
    for name, hoisted in program.hoisted.items():
        prepare, step = (graph_of(folder, program.part_of(name, part)) for part in (PREPARE, STEP))
        split = split_graph(graph_of(folder, name), hoisted.constant, prepare, step)
        halves[name] = Network(takes=split.prepare), Network(takes=(*split.step, *split.passed))
    return parted(program, halves)


def write_program(program: Program, folder: Path) -> None:
    """Write ``program.json``."""
    (folder / FILE).write_text(json.dumps(program.as_json(), indent=2) + "\n")


def read_program(folder: Path) -> Program:
    """An artifact's program.

    Raises:
        ToolchainError: it cannot be read, or is of a version that wrote several networks otherwise.
    """
    for name in BEFORE:
        if (folder / name).exists():
            raise ToolchainError(
                f"{name} is of an earlier version, which this one does not read",
                where=str(folder),
                help=f"write the artifact anew: enginewright run {folder / 'recipe.toml'} -o NEW",
            )
    path = folder / FILE
    return Program.from_json(read_json(path, what=FILE), where=str(path)) if path.exists() else SOLE


def called_as(program: Program, network: str, model: Model) -> Model:
    """A model as one of its networks is called before it is parted, given how all of them together are."""
    own = program.networks[network]
    states = [NewInput(name=s.name, shape=s.shape, dtype=s.dtype) for s in program.read_by(network)]
    specs = (*with_inputs(model, states).inputs, *(program.inner if own.takes is not None else ()))
    outputs = model.outputs if own.outputs is None else own.outputs
    return replace(
        model,
        inputs=tuple(spec for spec in specs if own.takes is None or spec.name in own.takes),
        outputs=(*outputs, *program.given_by(network)),
    )


def inputs_of_network(
    program: Program, network: str, folder: Path, model: Model, calls: Sequence[Arrays]
) -> tuple[dict[str, ShapeRange], list[Arrays]]:
    """Shapes that the inputs of one network may take, and inputs like those it will see.

    What others pass to it is found by running them: at the smallest, typical and largest sizes, and on the calls.

    Args:
        program: with the networks that there are graphs of.
        network: the one that is asked for.
        folder: has their graphs.
        model: as the whole program is called.
        calls: of the whole program.
    """
    specs = called_as(program, network, model).inputs
    elsewhere = {spec.name for spec in (*model.inputs, *program.inner)}
    states = [spec for spec in specs if spec.name not in elsewhere]
    way, _ = next(program.calls_of(network))
    before = list(takewhile(lambda name: name != network, (call.network for call in way.calls)))
    graphs = {name: GraphModule(load_graph(path := graph_of(folder, name)), path) for name in before}

    def given(call: Arrays, sizes: Sizes) -> Arrays:
        known = {**draw(states, seed=0, sizes=sizes), **call}
        for name, graph in graphs.items():
            takes = program.networks[name].takes
            inputs = {key: torch.from_numpy(array) for key, array in known.items() if takes is None or key in takes}
            outputs = [value.name for value in graph.graph.graph.outputs]
            known |= {str(key): tensor.numpy() for key, tensor in zip(outputs, graph(**inputs), strict=True)}
        takes = program.networks[network].takes
        return {key: known[key] for key in (takes if takes is not None else [spec.name for spec in specs])}

    ranges = {spec.name: ShapeRange(*spec.limits()) for spec in specs}
    mine = [given(call, {}) for call in calls]
    if passed := [key for key in program.networks[network].takes or () if key not in ranges]:
        low, typical, high = (
            given(draw(model.inputs, seed=0, sizes=sizes), sizes) for sizes in at_limits(model.inputs)
        )
        ranges |= {key: ShapeRange(low[key].shape, typical[key].shape, high[key].shape) for key in passed}
    return ranges, mine


def parts_for(step: TargetStep, folder: Path) -> tuple[str, ...]:
    """The networks that a target has an engine of; one that runs the module has the whole of them."""
    return ("",) if step.target.runs_module else tuple(read_program(folder).networks)


def place_of(step: TargetStep, folder: Path, network: str) -> Path:
    """The folder of one engine."""
    return folder / "engines" / f"{step.name}{suffix(network)}"


def runner_of(step: TargetStep, folder: Path, threads: int, module: Callable[[], nn.Module]) -> Runner:
    """An artifact's engines for one target as one."""

    def load(network: str) -> Any:
        return step.target.load(place_of(step, folder, network), threads=threads, module=module)

    if step.target.runs_module:
        return load("")
    program = read_program(folder)
    if program == SOLE:
        return load("")
    return on_one_device(Driver(program=program, networks={name: load(name) for name in program.networks}))


def on_one_device(driver: Driver) -> Runner:
    """The same program; where all its engines take tensors on one device, what passes between them stays there."""
    ways = [to_device_of(network) for network in driver.networks.values()]
    devices = {device_of(network) for network in driver.networks.values()}
    return OnDevice(driver, devices.pop()) if len(devices) == 1 and all(ways) else driver


class OnDevice:
    """A program whose values lie on one device from call to call; called with arrays or tensors, it answers in kind.

    Args:
        runner: whose networks all take tensors there.
        device: where.
    """

    def __init__(self, runner: Driver, device: str) -> None:
        self.runner, self.device = replace(runner, kind=TENSORS), device
        self.clock = clock_of(next(iter(runner.networks.values())))

    def to_device(self, inputs: Arrays) -> Values:
        """Named arrays -> named tensors on the device."""
        to_device = to_device_of(next(iter(self.runner.networks.values())))
        assert to_device is not None
        return to_device(inputs)

    def __call__(self, inputs: Values) -> Values:
        """Named inputs -> named outputs."""
        if holds_tensors(inputs):
            return self.runner(inputs)
        return dict(on_host(self.runner(self.to_device(inputs))))

    def first_non_finite(self, inputs: Arrays) -> str:
        """What the first network says that can tell; empty where none can."""
        return self.runner.first_non_finite(self.to_device(inputs))


def notes_of(runner: Any) -> list[str]:
    """For the report: what work that is done once for a run takes, where there is some."""
    while not isinstance(runner, Driver) and hasattr(runner, "runner"):
        runner = runner.runner
    if not isinstance(runner, Driver) or not any(runner.memory.seconds.values()):
        return []
    each = [median(seconds) for seconds in runner.memory.seconds.values()]
    count = sum(len(seconds) for seconds in runner.memory.seconds.values())
    return [f"latency is of a step; preparing a run took {sum(each) * 1e3:.3g} ms more, once (median of {count})"]
