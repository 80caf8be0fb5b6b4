"""What can be known before any work: files that are not there, and targets that this machine cannot build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from enginewright import sources
from enginewright.ground.errors import ToolchainError, UnavailableError, raise_faults, unknown
from enginewright.passes.contract import Pass
from enginewright.recipe import Recipe
from enginewright.sources.mistaken import HUB, mistaken
from enginewright.validation.contract import WorkloadMetric
from enginewright.validation.metrics import load_metrics


class Wanted(NamedTuple):
    """A path that a recipe reads, and the setting that names it."""

    text: str
    where: str
    what: str


def check_files(recipe: Recipe) -> None:
    """Refuse a recipe that reads what is not there.

    Raises:
        ToolchainError: weights, calibration inputs, adapters, data, teachers or scores that are missing; all at once.
    """
    faults = [fault for wanted in files_of(recipe) if (fault := missing(wanted, recipe))]
    for number, step in enumerate(recipe.steps):
        where = f"steps[{number}] ({step.name()})"
        faults += [fault for text in models_of(step) if (fault := no_model(text, recipe, where))]
        faults += [fault for text in scores_of(step) if (fault := no_score(text, recipe, where))]
    raise_faults(faults)


def check_targets(recipe: Recipe) -> list[str]:
    """Refuse a recipe with a target that must be built and cannot be; what is said of optional ones.

    Raises:
        UnavailableError: each such target with the reason.
    """
    faults: list[ToolchainError] = []
    notes = []
    for entry in recipe.targets:
        name, reason = entry.name, entry.target.availability().why_not("buildable")
        if reason and entry.optional:
            notes.append(f"{name} is optional and cannot be built here: {reason}")
        elif reason:
            faults.append(
                UnavailableError(
                    f"target {name} cannot be built here: {reason}",
                    where=f"--target {name}",
                    help=f"leave it out, or make it optional (--target {name}:optional=true); "
                    "enginewright doctor tells what this machine can do",
                )
            )
    raise_faults(faults)
    return notes


def files_of(recipe: Recipe) -> Iterator[Wanted]:
    """Every file that a recipe names."""
    if recipe.head.weights:
        yield Wanted(recipe.head.weights, "weights", "weights file")
    if recipe.head.calibration.file:
        yield Wanted(recipe.head.calibration.file, "calibration.file", "calibration file")
    for number, step in enumerate(recipe.steps):
        made = (getattr(step, "checkpoint", None), getattr(step, "log", None))  # written where they are not there
        apart = {*made, *(score.rpartition(":")[0] for score in scores_of(step))}
        for text in paths_of(step):
            if text not in apart:
                yield Wanted(text, f"steps[{number}] ({step.name()})", "file")


def paths_of(step: Pass) -> list[str]:
    """Paths among a step's settings: those that would change if the recipe moved."""
    return texts_asked(lambda tell: step.moved(tell, str))


def models_of(step: Pass) -> list[str]:
    """Model strings among a step's settings."""
    return texts_asked(lambda tell: step.moved(str, tell))


def texts_asked(ask: Callable[[Callable[[str], str]], object]) -> list[str]:
    """What a function is called with while something is asked."""
    found: list[str] = []

    def tell(text: str) -> str:
        found.append(text)
        return text

    ask(tell)
    return found


def scores_of(step: Pass) -> list[str]:
    """What a step is judged by, where it says so; a setting of another meaning may be called a score too."""
    values = (getattr(step, name) for name in step.functions)
    return [value for value in values if value]


def missing(wanted: Wanted, recipe: Recipe) -> ToolchainError | None:
    """The error for a file that is not there."""
    path = recipe.path(wanted.text)
    if path.is_file():
        return None
    message = (
        f"{wanted.what} {wanted.text!r} is a folder, and a file is wanted"
        if path.is_dir()
        else f"there is no {wanted.what} {wanted.text!r}"
    )
    return ToolchainError(message, where=wanted.where, help="check the path; it starts at the recipe's folder")


def no_model(text: str, recipe: Recipe, where: str) -> ToolchainError | None:
    """The error for a teacher that cannot be loaded: an artifact's folder, a file of weights, or a model string."""
    if (recipe.path(text) / "recipe.toml").is_file():
        return None
    parts = sources.parts_of_path(text)
    if parts is None:
        return mistaken(text, where=where)
    if recipe.path(parts.path).exists() or (parts.prefix not in sources.FILES and HUB.fullmatch(parts.path)):
        return None
    return ToolchainError(f"there is no file or folder {parts.path!r}", where=f"{where}, {text}")


def no_score(text: str, recipe: Recipe, where: str) -> ToolchainError | None:
    """The error for a score that does not exist."""
    if ".py:" in text:
        file = text.rpartition(":")[0]
        return missing(Wanted(file, where, "file of a score"), recipe)
    known = ["fidelity", *(name for name, metric in load_metrics().items() if isinstance(metric, WorkloadMetric))]
    return None if text in known else unknown("score", text, [*known, "FILE.py:FUNCTION"], where=where)
