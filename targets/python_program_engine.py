"""A network written as Python source that needs no package: for networks that are programs, and as a second oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import read_setting, read_text
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.targets.contract import Answer, Availability, Built, Graph, Target

PROGRAM = "program.py"
SIGNATURE = "signature.json"
FUNCTION = "logits_of"
"""What the source calls its function from one row of the network's input to one row of its output, both as lists."""


class PythonProgram(Target):
    """Python source of a module that has ``python_source``; it takes one input and gives one output of floats."""

    formats: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("int8", "fp8", "int4_weights", "int8_weights", "int4_int8", "nvfp4_weights", "mxfp8_weights"),
        "refused: a Python program has whole numbers and no formats",
    )

    def availability(self) -> Availability:
        """Always: it needs Python alone."""
        yes = Answer(True)
        return Availability(installed=yes, importable=yes, buildable=yes, runnable=yes)

    def build(self, graph: Graph, folder: Path) -> Built:
        """Write the source, and what its input and output are called."""
        if graph.source is None:
            raise ToolchainError(
                "this network cannot be written as a Python program",
                help="export a model that is one, such as transformer_programs:sort, or leave this target out",
            )
        if len(graph.ranges) != 1 or len(graph.outputs) != 1:
            raise ToolchainError(
                f"a Python program has one input and one output; this network has "
                f"{len(graph.ranges)} and {len(graph.outputs)}"
            )
        (folder / PROGRAM).write_text(graph.source(), encoding="utf-8")
        named = {"input": next(iter(graph.ranges)), "output": graph.outputs[0]}
        (folder / SIGNATURE).write_text(json.dumps(named) + "\n")
        return Built()

    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module]) -> Runner:
        """Ready the source, where it is word for word what the artifact's own model is written as.

        An artifact is opened without running code that it brings. So the model is made again, and written again.

        Raises:
            ToolchainError: the source in the artifact is another.
        """
        text = read_text(folder / PROGRAM, what="the Python program")
        write = source_of(module())
        if write is None or write() != text:
            raise ToolchainError(
                f"{PROGRAM} is not what the artifact's model is written as; it is not run",
                where=str(folder / PROGRAM),
                help="export the model again",
            )
        names: dict[str, Any] = {"__name__": "program"}
        exec(compile(text, PROGRAM, "exec"), names)
        named = {key: read_setting(folder / SIGNATURE, key, str) for key in ("input", "output")}
        return ProgramRunner(names[FUNCTION], **named)


def source_of(module: nn.Module) -> Callable[[], str] | None:
    """What writes a module as Python source; None for a module that cannot be."""
    return getattr(module, "python_source", None)


class ProgramRunner:
    """Calls a function of lists with each row of an array."""

    def __init__(self, function: Callable[[list[Any]], list[Any]], *, input: str, output: str) -> None:
        self.function, self.input, self.output = function, input, output

    def __call__(self, inputs: Arrays) -> Arrays:
        """The named input -> the named output, as float32."""
        rows = [self.function(row) for row in inputs[self.input].tolist()]
        return {self.output: np.array(rows, dtype=np.float32)}
