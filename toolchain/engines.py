"""The engines of one target in an artifact: one, one for each stretch of timesteps, or a pair that runs in a row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from enginewright.ground.runner import Runner
from enginewright.preparing import PREPARE, STEP, Preparing, read_halves
from enginewright.recipe import TargetStep
from enginewright.switching import parts_of, read_table, switching


def parts_for(step: TargetStep, folder: Path) -> tuple[str, ...]:
    """What a target's engines are told apart by: a target that runs the module has no use for a pair."""
    if read_halves(folder):
        return (STEP,) if step.target.runs_module else (PREPARE, STEP)
    table = read_table(folder)
    return table.names if table else ("",)


def runner_of(step: TargetStep, folder: Path, threads: int, module: Callable[[], nn.Module]) -> Runner:
    """An artifact's engine for one target; of several networks, one that switches between them or runs a pair."""
    halves = read_halves(folder)

    def load(name: str) -> Runner:
        place = folder / "engines" / f"{step.target.name()}{name}"
        part = "" if halves else name
        return step.target.load(place, threads=threads, module=lambda: parts_of(module())[part])

    if halves:
        return load(STEP) if step.target.runs_module else Preparing(load(PREPARE), load(STEP), halves)
    table = read_table(folder)
    return switching([load(name) for name in table.names], table) if table else load("")
