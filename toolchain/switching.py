"""Artifacts of several engines, one for each stretch of a sampler's timesteps: which is which, and a runner of all.

``engines.json`` beside the graphs holds the table; without it an artifact has one engine for a target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import nn

from passes.variants import ByTimestep
from validation.contract import Runner
from validation.inputs import Arrays

TABLE = "engines.json"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Which engine runs a call.

    Args:
        input: holds the timestep, one for each row.
        timesteps: the schedule.
        table: for each of them, which engine, counted from 0; a timestep beside the schedule takes the nearest.
    """

    input: str
    timesteps: tuple[float, ...]
    table: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What files and folders of each engine are told apart by."""
        return tuple(f"-{number}" for number in range(max(self.table) + 1))


def table_of(module: nn.Module) -> Table | None:
    """The table of a module that is several networks."""
    if not isinstance(module, ByTimestep):
        return None
    return Table(input=module.input, timesteps=module.timesteps, table=module.table)


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
    content = json.loads(path.read_text())
    return Table(input=content["input"], timesteps=tuple(content["timesteps"]), table=tuple(content["table"]))


class Switching:
    """Runs each row of a call in the engine of its timestep."""

    def __init__(self, runners: Sequence[Runner], table: Table) -> None:
        self.runners, self.table = runners, table

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs with as many rows each -> named outputs, rows in the same order."""
        times = inputs[self.table.input].astype(np.float32)
        schedule = np.asarray(self.table.timesteps, np.float32)
        chosen = np.asarray(self.table.table)[np.abs(times[:, None] - schedule).argmin(axis=1)]
        numbers = sorted(set(chosen.tolist()))
        if len(numbers) == 1:
            return self.runners[numbers[0]](inputs)
        rows = [np.flatnonzero(chosen == number) for number in numbers]
        parts = [
            self.runners[number]({name: array[own] for name, array in inputs.items()})
            for number, own in zip(numbers, rows, strict=True)
        ]
        back = np.concatenate(rows).argsort(kind="stable")
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

    def first_non_finite(self, inputs: Arrays) -> str:
        """What the first engine that can tell says."""
        for runner in self.runners:
            locate = getattr(runner, "first_non_finite", None)
            if locate and (found := locate(inputs)):
                return str(found)
        return ""
