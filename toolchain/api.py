"""The commands as functions, for notebooks and scripts: open, plan, export, compare and bench."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginewright import artifact, pipeline, whole
from enginewright.arguments import named
from enginewright.ground.errors import ToolchainError
from enginewright.measure import (
    answers_of,
    compared,
    judge_gates,
    masks_of,
    refuse_unsteady,
    time_all,
    validation_calls,
)
from enginewright.opened import Opened, open_subject
from enginewright.progress import Progress
from enginewright.recipe import Recipe, Validation, gate_names, make, read, threads_here
from enginewright.reports.record import Gate, Latency, Report, TargetRecord
from enginewright.validation.fidelity import non_finite
from enginewright.validation.gates import parse
from enginewright.validation.inputs import draw

CALLS = 8
"""Calls to compare on where no recipe says how many."""

Stated = str | Mapping[str, Any]
"""A pass or a target: ``"NAME:key=value,key=value"`` as on the command line, or a recipe's table."""


def open(subject: str | Path, *, source: str | Path | None = None, trust_code: bool = False) -> Opened:
    """What can be run of an artifact, ``ARTIFACT#TARGET``, an ONNX file or a model string, ready to run.

    Args:
        subject: what to open.
        source: the file or folder that an artifact was made from, if that was moved.
        trust_code: run the Python code that an artifact's model is made by.

    Returns:
        Its runners by name (named arrays in, named arrays out), and the inputs that they take.

    Raises:
        ToolchainError: there is no such thing, it is damaged, or nothing in it runs here.
    """
    places = () if source is None else (Path(source),)
    return open_subject(str(subject), source=places, trust_code=trust_code)


def recipe(model: str, steps: Sequence[Stated] = (), targets: Sequence[Stated] = (), **settings: Any) -> Recipe:
    """A recipe, as ``export`` and ``plan`` take it apart.

    Args:
        model: a model string, such as ``dit:digits`` or ``hf:FOLDER``.
        steps: passes, in order.
        targets: engines to build.
        settings: the other tables of a recipe: ``gates``, ``seed``, ``validation``, ``calibration``, ``export``.

    Raises:
        ToolchainError: every fault at once.
    """
    tables = {
        "steps": [named("pass", each) if isinstance(each, str) else dict(each) for each in steps],
        "targets": [named("target", each) if isinstance(each, str) else dict(each) for each in targets],
    }
    return make({"model": model, **settings, **tables})


def plan(
    model: str | Path, steps: Sequence[Stated] = (), *, quiet: bool = True, trust_code: bool = False, **settings: Any
) -> list[pipeline.Decision]:
    """Decide every step and estimate what it would do; nothing is written.

    Args:
        model: a model string, or the path of a recipe (``.toml``).
        steps: passes, in order; none for a recipe.
        quiet: show no progress.
        trust_code: whether artifacts that a step names may run the code of their models.
        settings: as for ``recipe``.

    Returns:
        For each step what it would change, leave and cost, and its plan.
    """
    progress = Progress(quiet=quiet)
    return whole.decide(recipe_of(model, steps, (), settings), progress, trust_code=trust_code)


def export(
    model: str | Path,
    out: str | Path,
    steps: Sequence[Stated] = (),
    targets: Sequence[Stated] = (),
    *,
    force: bool = False,
    quiet: bool = True,
    trust_code: bool = False,
    **settings: Any,
) -> Report:
    """Take a model through its steps into engines, validate them against the original, and write the artifact.

    Args:
        model: a model string, or the path of a recipe (``.toml``).
        out: the folder to write.
        steps: passes, in order.
        targets: engines to build.
        force: replace an artifact of ours at ``out``.
        quiet: show no progress.
        trust_code: whether artifacts that a step names may run the code of their models.
        settings: as for ``recipe``.

    Returns:
        The report, whose ``verdict`` says whether every gate was met.

    Raises:
        ToolchainError: something asked for is wrong or cannot be done here; nothing is written then.
    """
    asked = recipe_of(model, steps, targets, settings)
    artifact.refuse_existing(Path(out), force=force)
    progress = Progress(quiet=quiet)
    return whole.export(asked, Path(out), force=force, progress=progress, trust_code=trust_code)[0]


def recipe_of(
    model: str | Path, steps: Sequence[Stated], targets: Sequence[Stated], settings: Mapping[str, Any]
) -> Recipe:
    """The recipe in a file, or one of what was named."""
    if not str(model).endswith(".toml"):
        return recipe(str(model), steps, targets, **settings)
    if steps or targets or settings:
        raise ToolchainError(f"{str(model)!r} is a recipe, which says its own steps, targets and settings")
    return read(Path(model))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Outputs of several runners beside those of one, on the same calls.

    Args:
        original: what the others were held against.
        calls: how many there were.
        runners: what was found, for each.
        gates: bounds that were asked, and their verdicts.
    """

    original: str
    calls: int
    runners: tuple[TargetRecord, ...]
    gates: tuple[Gate, ...]


def compare(
    original: str | Path | Opened,
    candidate: str | Path | Opened,
    *,
    gates: Sequence[str] = (),
    calls: int | None = None,
    source: Sequence[Path] = (),
    trust_code: bool = False,
    quiet: bool = True,
) -> Comparison:
    """Hold every runner of one subject against another's first, on calls that validation draws.

    Args:
        original: what is right; as for ``open``, or opened already.
        candidate: what is held against it.
        gates: bounds, such as ``fidelity.cosine >= 0.999``.
        calls: how many; None for as many as the artifact was validated on.
        source: where the sources of artifacts may be, if they were moved.
        trust_code: run the Python code that artifacts' models are made by.
        quiet: show no progress.

    Raises:
        ToolchainError: one of them cannot be opened, or the original answers one call in two ways.
    """
    bounds = [parse(text, known=gate_names(), where="--gate") for text in gates]
    with Progress(quiet=quiet).stage("load"):
        first, second = (
            each if isinstance(each, Opened) else open_subject(str(each), source=source, trust_code=trust_code)
            for each in (original, candidate)
        )
    name, runner = next(iter(first.runners.items()))
    inputs, mask = calls_for(first, second, calls)
    refuse_unsteady(runner, inputs[0])
    wanted = answers_of(runner, inputs)
    records = []
    for other, candidate_runner in second.runners.items():
        got = [candidate_runner(call) for call in inputs]
        faults = non_finite(got)
        found = (
            {"faults": faults} if faults else compared(wanted, named_alike(wanted, got), masks_of(mask, inputs), mask)
        )
        able = dict.fromkeys(("installed", "importable", "buildable", "runnable", "built"), True)
        records.append(TargetRecord(name=other, parameters={}, **able, **found))
    judged = judge_gates(bounds, records)
    return Comparison(original=name, calls=len(inputs), runners=tuple(records), gates=tuple(judged))


def calls_for(first: Opened, second: Opened, count: int | None) -> tuple[list[Any], str]:
    """The calls to compare on, and the input that masks rows: those of an artifact's validation where one takes part.

    Args:
        first: what is opened, for its model and recipe.
        second: the same; asked where the first has none.
        count: how many; None for as many as the artifact was validated on.
    """
    of = first if first.seed is not None else second
    number = count if count is not None else of.calls or CALLS
    if number < 1:
        raise ToolchainError(f"--calls is {number}; at least 1 is needed")
    model = first.model or second.model
    if model is None:
        return [draw(first.inputs, seed=i) for i in range(number)], ""
    return validation_calls(model, number, of.seed or 0), model.mask


def named_alike(wanted: list[Any], got: list[Any]) -> list[Any]:
    """Outputs under the original's names: by name where both have the same ones, in whatever order.

    Else by place, where both have as many: engines of other makers name theirs otherwise.
    """
    if wanted and got and len(wanted[0]) == len(got[0]) and wanted[0].keys() != got[0].keys():
        return [dict(zip(w, g.values(), strict=True)) for w, g in zip(wanted, got, strict=True)]
    return got


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Paired latency of runners beside the original.

    Args:
        threads: of every runner.
        runners: times and ratio, by name.
        not_measured: what does not run here, and why.
    """

    threads: int
    runners: Mapping[str, Latency]
    not_measured: Mapping[str, str]


def bench(
    subject: str | Path,
    against: Sequence[str | Path] = (),
    *,
    rounds: int = 30,
    threads: int | None = None,
    sizes: Callable[[Opened], Mapping[str, int]] | Mapping[str, int] | None = None,
    source: Sequence[Path] = (),
    trust_code: bool = False,
    quiet: bool = True,
) -> Timing:
    """Time everything that is named in turns, beside the first one's original.

    Args:
        subject: as for ``open``; an artifact brings its original along.
        against: more of them.
        rounds: samples of each.
        threads: of every runner; by default every core allowed.
        sizes: of dynamic dimensions; typical ones where none is given.
        source: where the sources of artifacts may be, if they were moved.
        trust_code: run the Python code that artifacts' models are made by.
        quiet: show no progress.

    Raises:
        ToolchainError: one of them cannot be opened, or there is nothing to time it against.
    """
    subjects = [str(each) for each in (subject, *against)]
    if len(subjects) == 1 and not Path(subjects[0].partition("#")[0]).is_dir():
        raise ToolchainError("there is nothing to time it against", help="name an artifact, or add --against SUBJECT")
    progress = Progress(quiet=quiet)
    threads = threads or threads_here()
    with progress.stage("load"):
        opened = [open_subject(text, threads=threads, source=source, trust_code=trust_code) for text in subjects]
    first = opened[0]
    runners = {
        (name if len(opened) == 1 else f"{text} {name}"): runner
        for text, one in zip(subjects, opened, strict=True)
        for name, runner in one.runners.items()
        if runner is not first.original
    }
    original = first.original or runners.pop(next(iter(runners)))
    call = draw(first.inputs, seed=0, sizes=sizes(first) if callable(sizes) else sizes or {})
    with progress.stage("time, in turns"):
        timed = time_all(original, runners, call, Validation(rounds=rounds), 0, threads, progress)
    absent = {name: reason for one in opened for name, reason in one.absent.items()}
    return Timing(threads=threads, runners=timed, not_measured=absent)
