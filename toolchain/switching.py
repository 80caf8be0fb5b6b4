"""Artifacts of several engines, one for each stretch of a sampler's timesteps: which is which, and a runner of all.

``engines.json`` beside the graphs holds the table; without it an artifact has one engine for a target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from enginewright.added import with_inputs
from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import first_line, read_json
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.passes.contract import NewInput
from enginewright.passes.variants import REUSED, ByTimestep, Walk, some_rows
from enginewright.passes.variants import Reusing as ReusingModule
from enginewright.sources.contract import Model

TABLE = "engines.json"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Which engine runs a call.

    Args:
        input: holds the timestep, one for each row.
        timesteps: the schedule.
        table: for each of them, which engine, counted from 0; a timestep beside the schedule takes the nearest.
        reused: shape of one row of what engine 0 gives beside its outputs and engine 1 takes; None: nothing.
        dtype: its type.
        shared: inputs that have no row for each sample.
    """

    input: str
    timesteps: tuple[float, ...]
    table: tuple[int, ...]
    reused: tuple[int, ...] | None = None
    dtype: str = "float32"
    shared: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What files and folders of each engine are told apart by."""
        return tuple(f"-{number}" for number in range(max(self.table) + 1))

    def model_of(self, name: str, model: Model) -> Model:
        """A model as one engine is called, given how all of them together are."""
        if self.reused is None:
            return model
        if name == self.names[0]:
            return replace(model, outputs=(*model.outputs, REUSED))
        return with_inputs(model, [NewInput(name=REUSED, shape=self.reused, dtype=self.dtype)])


def table_of(module: nn.Module) -> Table | None:
    """The table of a module that is several networks."""
    if not isinstance(module, ByTimestep):
        return None
    table = Table(input=module.input, timesteps=module.timesteps, table=module.table, shared=module.shared)
    return replace(table, reused=module.shape, dtype=module.dtype) if isinstance(module, ReusingModule) else table


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """What is exported, by what tells its files apart: one network, or several."""
    table = table_of(module)
    return dict(zip(table.names, module.variants, strict=True)) if table else {"": module}  # type: ignore[arg-type]


def write_table(module: nn.Module, folder: Path) -> None:
    """Write ``engines.json`` where a module is several networks."""
    if table := table_of(module):
        (folder / TABLE).write_text(json.dumps(asdict(table), indent=2) + "\n")


def read_table(folder: Path) -> Table | None:
    """An artifact's table, if it has one."""
    path = folder / TABLE
    if not path.exists():
        return None
    content = read_json(path, what=TABLE)
    try:
        table = Table(
            input=content["input"],
            timesteps=tuple(content["timesteps"]),
            table=tuple(content["table"]),
            shared=tuple(content.get("shared", ())),
        )
        reused = content.get("reused")
        sound = all(isinstance(t, int | float) for t in table.timesteps) and all(type(n) is int for n in table.table)
        sound = sound and all(isinstance(name, str) for name in table.shared)
        if not sound or not isinstance(table.input, str) or not table.table:
            raise ValueError("no table of timesteps")
        return table if reused is None else replace(table, reused=tuple(reused), dtype=content["dtype"])
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise ToolchainError(f"{TABLE} cannot be read: {first_line(cause)}", where=str(path)) from cause


def switching(runners: Sequence[Runner], table: Table) -> Switching:
    """One runner of all engines."""
    return (Switching if table.reused is None else Reusing)(runners, table)


class Switching:
    """Runs each row of a call in the engine of its timestep."""

    def __init__(self, runners: Sequence[Runner], table: Table) -> None:
        self.runners, self.table = runners, table

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs with as many rows each, but for shared ones -> named outputs, rows in the same order."""
        chosen = np.asarray(self.table.table)[self.steps(inputs)]
        numbers = sorted(set(chosen.tolist()))
        if len(numbers) == 1:
            return self.runners[numbers[0]](inputs)
        rows = [np.flatnonzero(chosen == number) for number in numbers]
        parts = [
            self.runners[number](some_rows(inputs, own, self.table.shared))
            for number, own in zip(numbers, rows, strict=True)
        ]
        back = np.concatenate(rows).argsort(kind="stable")
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

    def steps(self, inputs: Arrays) -> npt.NDArray[np.int64]:
        """For each row the timestep of the schedule that is nearest to its own."""
        times = inputs[self.table.input].astype(np.float32).reshape(-1)
        schedule = np.asarray(self.table.timesteps, np.float32)
        return np.abs(times[:, None] - schedule).argmin(axis=1)

    def first_non_finite(self, inputs: Arrays) -> str:
        """What the first engine that can tell says."""
        for runner in self.runners:
            locate = getattr(runner, "first_non_finite", None)
            if locate and (found := locate(inputs)):
                return str(found)
        return ""


class Reusing(Switching):
    """Runs the whole engine or the short one, and keeps what the first gave; ``Walk`` says when it may be reused."""

    def __init__(self, runners: Sequence[Runner], table: Table) -> None:
        super().__init__(runners, table)
        self.walk = Walk(table.table)

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs."""
        shapes = tuple(sorted((name, array.shape) for name, array in inputs.items()))
        kept = self.walk.reusable(set(self.steps(inputs).tolist()), shapes)
        if kept is not None:
            return self.runners[1]({**inputs, REUSED: kept})
        outputs = dict(self.runners[0](inputs))
        self.walk.keep(outputs.pop(REUSED))
        return outputs
