"""What a pass's parameter ``score`` names: a number for a model, higher is better.

* ``fidelity``: minus the relative L2 error of its outputs to the original's, on the calibration inputs;
* the name of a metric of whole runs, such as ``judged_as_asked``, where the model has such a task;
* ``FILE.py:FUNCTION``: the user's own, called with the module. The file runs as it would in Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import nn

from enginewright import calibration
from enginewright.ground.errors import ToolchainError, unknown
from enginewright.passes.contract import Inputs
from enginewright.passes.kernel.distance import relative_l2
from enginewright.recipe import Recipe
from enginewright.sources import user_file
from enginewright.sources.contract import Model
from enginewright.targets.pytorch_engine import EagerRunner, flat
from enginewright.validation.contract import Workload, WorkloadMetric
from enginewright.validation.metrics import load_metrics

Score = Callable[[nn.Module], float]


def score_of(text: str, model: Model, recipe: Recipe, calls: Sequence[Inputs] | None = None) -> Score:
    """The score that a text names.

    Args:
        text: its name.
        model: what is compared with: the original, as the steps before mean to change it.
        recipe: says how sampling runs are made, and where the user's files start.
        calls: calibration calls of that model; None: those that the recipe asks for.

    Raises:
        ToolchainError: no such score, or not for this model.
    """
    if text == "fidelity":
        return fidelity(model, calibration.inputs(recipe, model) if calls is None else calls)
    if ".py:" in text:
        return of_user(text, recipe.folder)
    metrics = {name: metric for name, metric in load_metrics().items() if isinstance(metric, WorkloadMetric)}
    if text not in metrics:
        raise unknown("score", text, ["fidelity", *metrics, "FILE.py:FUNCTION"])
    metric = metrics[text]
    if not isinstance(model.task, metric.workload):
        job = metric.workload.job
        raise ToolchainError(f"score {text!r} is of whole {job} runs, and {model.name} has no {job} task")
    return of_samples(metric, model.task, model, recipe)


def fidelity(model: Model, calls: Sequence[Inputs]) -> Score:
    """Closeness to a model's outputs; 0 is equality."""

    def outputs(module: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return [torch.cat([value.double().flatten() for value in flat(module(**call))]) for call in calls]

    wanted = outputs(model.module)

    def score(module: nn.Module) -> float:
        return -fmean(relative_l2(exact, got) for exact, got in zip(wanted, outputs(module), strict=True))

    return score


def of_samples(metric: WorkloadMetric, task: Workload, model: Model, recipe: Recipe) -> Score:
    """A metric of whole runs, from other noise or prompts than validation's; turned round where lower is better."""
    count = recipe.head.validation.samples or task.samples
    threads = recipe.threads
    seed = recipe.head.seed + calibration.CALIBRATION_SEED

    def drawn(module: nn.Module) -> Any:
        return task.drawn(task.sample(EagerRunner(module, threads=threads, outputs=model.outputs), count, seed))

    original = drawn(model.module)
    return lambda module: metric.measure(task, original, drawn(module)) * (1 if metric.higher_is_better else -1)


def of_user(text: str, folder: Path) -> Score:
    """A function of the user's file that gives a number."""
    return users_function(text, folder, lambda found: float(found))


def losses_of(text: str, folder: Path) -> Callable[[nn.Module], torch.Tensor]:
    """A function of the user's file (``FILE.py:FUNCTION``) that gives a loss for each sample."""
    if ".py:" not in text:
        raise ToolchainError(f"losses are given by a function of yours, FILE.py:FUNCTION; {text!r} names none")
    return users_function(text, folder, one_per_sample)


Found = TypeVar("Found", float, torch.Tensor)


def users_function(text: str, folder: Path, read: Callable[[Any], Found]) -> Callable[[nn.Module], Found]:
    """The user's own function, what it gives read as wanted; a relative path starts at the recipe's folder."""
    file, _, name = text.rpartition(":")
    path = (folder / file).absolute()
    module = user_file.run(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise unknown("function", name, [n for n, value in vars(module).items() if callable(value)], where=str(path))

    def call(candidate: nn.Module) -> Found:
        with user_file.in_our_words(path, f"{name}(module)"):
            value = read(function(candidate))
        if torch.as_tensor(value).isnan().any():
            raise ToolchainError(f"{name} gave a score that is no number: {value}", where=str(path))
        return value

    weakref.finalize(call, user_file.forget, module.__name__.rpartition(".")[0]).atexit = False
    return call


def one_per_sample(found: Any) -> torch.Tensor:
    """Losses (B,)."""
    losses = torch.as_tensor(found).detach().double().cpu()
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"one loss for each sample, in one dimension, is wanted; got shape {tuple(losses.shape)}")
    return losses
