"""Artifacts of two engines in a row: one prepares what a sampling run needs once, the other does each of its steps.

``prepared.json`` beside the graphs says how the two are called; without it an artifact has no such pair.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import first_line, read_json
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays, InputSpec
from enginewright.passes.graph.module import GraphModule
from enginewright.passes.hoisting import hoisted
from enginewright.targets.contract import ShapeRange
from enginewright.targets.split_graph import Halves, split_graph
from enginewright.targets.weights import load_graph
from enginewright.validation.inputs import draw
from enginewright.validation.sizes import at_limits

TABLE = "prepared.json"
PREPARE, STEP = "-prepare", "-step"
"""What files and folders of the two engines are told apart by."""


def part_in_two(module: nn.Module, folder: Path) -> None:
    """Write two graphs in the place of ``model.onnx`` where a module asks for that.

    Raises:
        ToolchainError: nothing in the graph can be done once for a run.
    """
    if found := hoisted(module):
        graphs = [folder / f"model{name}.onnx" for name in (PREPARE, STEP)]
        halves = split_graph(folder / "model.onnx", found.constant, *graphs)
        (folder / TABLE).write_text(json.dumps(asdict(halves), indent=2) + "\n")


def read_halves(folder: Path) -> Halves | None:
    """How an artifact's two engines are called, if it has two."""
    path = folder / TABLE
    if not path.exists():
        return None
    content = read_json(path, what=TABLE)
    try:
        halves = Halves(**{key: tuple(names) for key, names in content.items()})
        if not all(isinstance(name, str) for names in vars(halves).values() for name in names):
            raise ValueError("a name that is no text")
        return halves
    except (TypeError, ValueError, AttributeError) as cause:
        raise ToolchainError(f"{TABLE} cannot be read: {first_line(cause)}", where=str(path)) from cause


def fed(
    folder: Path, name: str, specs: Sequence[InputSpec], calls: Sequence[Arrays]
) -> tuple[dict[str, ShapeRange], list[Arrays]]:
    """Shapes that the inputs of one of the two graphs may take, and inputs like those it will see.

    What the first graph passes on is found by running it: at the smallest, typical and largest sizes, and on the calls.
    """
    halves = read_halves(folder)
    assert halves is not None
    own = halves.prepare if name == PREPARE else halves.step
    ranges = {spec.name: ShapeRange(*spec.limits()) for spec in specs if spec.name in own}
    mine = [{key: array for key, array in call.items() if key in own} for call in calls]
    if name == PREPARE:
        return ranges, mine
    graph = GraphModule(load_graph(folder / f"model{PREPARE}.onnx"), folder / f"model{PREPARE}.onnx")

    def passed(call: Arrays) -> Arrays:
        given = graph(**{key: torch.from_numpy(call[key]) for key in halves.prepare})
        return {key: tensor.numpy() for key, tensor in zip(halves.passed, given, strict=True)}

    low, typical, high = (passed(draw(specs, seed=0, sizes=sizes)) for sizes in at_limits(specs))
    ranges |= {key: ShapeRange(low[key].shape, typical[key].shape, high[key].shape) for key in halves.passed}
    return ranges, [{**call, **passed(whole)} for call, whole in zip(mine, calls, strict=True)]


class Preparing:
    """Runs the first engine when one of its inputs is not what it was, and the second in each call."""

    def __init__(self, prepare: Runner, step: Runner, halves: Halves) -> None:
        self.prepare, self.step, self.halves = prepare, step, halves
        self.held: Arrays = {}
        self.passed: Arrays = {}
        self.seconds: list[float] = []
        """What each run of the first engine took."""

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs."""
        return self.step(self.completed(inputs))

    def completed(self, inputs: Arrays) -> Arrays:
        """What the second engine is called with."""
        now = {name: inputs[name] for name in self.halves.prepare}
        # Compared by content, with copies: a caller may write new values into the arrays it gave before.
        if not self.held or not all(np.array_equal(array, self.held[name]) for name, array in now.items()):
            began = time.perf_counter()
            self.passed = dict(self.prepare(now))
            self.seconds.append(time.perf_counter() - began)
            self.held = {name: array.copy() for name, array in now.items()}
        return {**{name: inputs[name] for name in self.halves.step}, **self.passed}

    def first_non_finite(self, inputs: Arrays) -> str:
        """What the first engine says that can tell."""
        halves = ((self.prepare, {name: inputs[name] for name in self.halves.prepare}), (self.step, None))
        for runner, call in halves:
            locate = getattr(runner, "first_non_finite", None)
            if locate and (found := locate(call or self.completed(inputs))):
                return str(found)
        return ""


def said_of(runner: Runner) -> list[str]:
    """For the report: what preparing takes, where it is apart."""
    while not isinstance(runner, Preparing) and hasattr(runner, "runner"):
        runner = runner.runner
    if not isinstance(runner, Preparing) or not runner.seconds:
        return []
    return [
        f"latency is of a step; preparing a run took {median(runner.seconds) * 1e3:.3g} ms more, once "
        f"(median of {len(runner.seconds)})"
    ]
