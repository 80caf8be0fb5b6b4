"""A model string as one artifact, whether it stands for one network or for a pipeline of several.

A pipeline's artifact has a folder for each part, which is a whole artifact itself, and beside them one report, recipe,
manifest and README. Its whole job (texts to pictures, say) is run with the engines of all parts and with the original
ones, on the same noise; figures of that stand under ``whole.TARGET``, those of a part under ``PART.TARGET``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enginewright import __version__, artifact, environment, origin, pipeline, preflight, samples, sources
from enginewright.at_sizes import eager
from enginewright.ground import spectra
from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.loaded import load
from enginewright.measure import answers_of, judge_gates, outputs_of, time_all
from enginewright.progress import Progress
from enginewright.recipe import WHOLE, Job, Recipe, TargetStep, Validation, read
from enginewright.reports import deploying, record, rendering
from enginewright.reports.pictures import png_grid
from enginewright.sources.jobs import Job as Work

BUDGET_S = 60.0
"""Time that timing the whole job may take, about."""

FEWEST = 3
"""Timed runs of each runner at least."""


def export(
    recipe: Recipe, out: Path, *, force: bool, progress: Progress, trust_code: bool = False
) -> tuple[record.Report, int]:
    """Run a recipe into ``out``, for every part of its model; returns the report and the exit code."""
    parts = sources.parts_of(recipe.model)
    recipe.refuse_parts(parts)
    if not parts:
        return pipeline.export(recipe, out, force=force, progress=progress, trust_code=trust_code)
    began = time.perf_counter()
    preflight.check_files(recipe)
    lies = artifact.place_of(out)
    with artifact.staging(out, force=force) as folder:
        done: dict[str, record.Report] = {}
        for number, part in enumerate(parts):
            progress.line(f"{part}, {number + 1} of {len(parts)}")
            done[part], _ = pipeline.export(
                recipe.part(part),
                folder / part,
                force=False,
                progress=progress,
                trust_code=trust_code,
                lies=lies / part,
            )
            gc.collect()  # a part's weights go before the next one's come
        targets = [together(step, done) for step in recipe.targets]
        notes, pictures = try_job(recipe, targets, folder, parts, progress, trust_code=trust_code)
        report = report_of(recipe, done, targets, pictures, notes, time.perf_counter() - began)
        write(recipe, report, folder, lies)
    return report, pipeline.exit_code(report)


def decide(recipe: Recipe, progress: Progress, *, trust_code: bool = False) -> list[pipeline.Decision]:
    """Plan every step, of every part of a model; writes nothing."""
    parts = sources.parts_of(recipe.model)
    recipe.refuse_parts(parts)
    if not parts:
        return pipeline.decide(recipe, progress, trust_code=trust_code)
    found: list[pipeline.Decision] = []
    for part in parts:
        progress.line(part)
        own = pipeline.decide(recipe.part(part), progress, trust_code=trust_code)
        found += [replace(each, step=each.step.model_copy(update={"part": part})) for each in own]
    return found


def together(step: TargetStep, done: Mapping[str, record.Report]) -> record.TargetRecord:
    """One target of all parts: whether it is there, and what is to be copied."""
    own = {part: target for part, each in done.items() for target in each.targets if target.name == step.name}
    lacking = [f"{part}: {target.reason}" for part, target in own.items() if target.reason and not target.built]
    idle = [f"{part}: {target.reason}" for part, target in own.items() if target.built and not target.runnable]
    built = all(target.built for target in own.values())
    sizes = [target.bytes for target in own.values() if target.bytes is not None]
    return record.TargetRecord(
        name=f"{WHOLE}.{step.name}",
        part=WHOLE,
        kind=step.target.name(),
        parameters={},
        **{
            answer: all(getattr(target, answer) for target in own.values())
            for answer in ("installed", "importable", "buildable", "runnable")
        },
        built=built,
        optional=step.optional,
        reason="; ".join(lacking or idle),
        bytes=sum(sizes) if built and sizes else None,
        seconds=sum(target.seconds or 0.0 for target in own.values()) if built else None,
        folders=[f"{part}/{place}" for part, target in own.items() for place in target.folders],
        files={f"{part}/{path}": size for part, target in own.items() for path, size in target.files.items()},
    )


def try_job(
    recipe: Recipe,
    targets: Sequence[record.TargetRecord],
    folder: Path,
    parts: Sequence[str],
    progress: Progress,
    *,
    trust_code: bool,
) -> tuple[list[str], list[record.Samples]]:
    """Run the whole job with each target that runs here, beside the original; fills the records in.

    Returns:
        How it was run, or why it was not; and pictures for the report.
    """
    settings = recipe.head.job or Job()
    able = [target for target in targets if target.built and target.runnable]
    skipped = "the recipe says so" if settings.skip else "validation was skipped" if recipe.head.validation.skip else ""
    if skipped or not able:
        why = skipped or "no target of all parts runs here"
        for target in able:
            target.reason = target.reason or f"the whole job was not run: {why}"
        return [f"the whole job was not run: {why}"], []
    try:
        with progress.stage("load the pipeline"):
            job = sources.job_of(recipe.model, **settings.model_dump(exclude={"skip"}))
            runners = {
                target.name: job.run(
                    job.assemble(engines(job, folder, target.name, threads=recipe.threads, trust_code=trust_code))
                )
                for target in able
            }
            original = job.run(job.assemble(originals(job, recipe.threads)))
        torch.set_num_threads(recipe.threads)  # of a pipeline's own networks, and of the code between engines
        pictures = compare(job, original, runners, able, recipe, progress)
    except ToolchainError as cause:
        for target in able:
            target.reason = f"the whole job was not run: {cause.message}"
        return [f"the whole job was not run: {cause.message}"], []
    alone = [part for part in parts if part not in job.parts]
    return [*job.notes, *(f"{part} takes no part in the whole job" for part in alone)], pictures


def engines(
    job: Work, folder: Path, target: str | None, *, threads: int | None = None, trust_code: bool
) -> dict[str, Any]:
    """One target's engines of the parts that a job needs, or the first that run here, as the job takes them."""
    name = target and target.removeprefix(f"{WHOLE}.")
    found = {part: load(folder / part, name, threads=threads, trust_code=trust_code) for part in job.parts}
    return {part: engine.runner for part, engine in found.items()} if job.models else found


def originals(job: Work, threads: int) -> dict[str, Runner]:
    """The untouched networks of a job that has none of its own."""
    return {part: eager(sources.load(text), threads) for part, text in job.models.items()}


def compare(
    job: Work,
    original: Runner,
    runners: Mapping[str, Runner],
    targets: Sequence[record.TargetRecord],
    recipe: Recipe,
    progress: Progress,
) -> list[record.Samples]:
    """Results and times of the whole job, into the records; and pictures of its results."""
    with progress.stage("run the whole job"):
        began = time.perf_counter()
        wanted = answers_of(original, job.calls)
        seconds = (time.perf_counter() - began) / len(job.calls)
        results: dict[str, list[Arrays]] = {}
        for target in targets:
            kept: list[Arrays] = []
            found = outputs_of(keeping(runners[target.name], kept), job.calls, wanted)
            for key, value in found.items():
                setattr(target, key, value)
            if not target.faults:
                results[target.name] = kept
        fit = {name: runners[name] for name in results}
        pictures = shown(wanted, results, job.rate)
    with progress.stage("time the whole job, in turns"):
        rounds = max(FEWEST, min(30, int(BUDGET_S / max(seconds, 1e-3) / (len(fit) + 1))))
        settings = Validation(rounds=rounds, warm_up=1)
        timed = time_all(original, fit, job.calls[0], settings, recipe.head.seed, recipe.threads, progress)
    for target in targets:
        target.latency = timed.get(target.name)
    return pictures


def keeping(runner: Runner, kept: list[Arrays]) -> Runner:
    """A runner whose answers are kept."""

    def run(inputs: Arrays) -> Arrays:
        kept.append(runner(inputs))
        return kept[-1]

    return run


def shown(wanted: Sequence[Arrays], got: Mapping[str, Sequence[Arrays]], rate: int) -> list[record.Samples]:
    """The original's results beside each target's, to look at; none where they are neither pictures nor sounds.

    Args:
        wanted: results of the original: pictures (n, H, W, C) in [0, 1], films (n, F, H, W, C), of which the first
            frames are shown, or among others a ``wave`` (n, S).
        got: those of the engines, by the name of their target.
        rate: samples a second of a wave; 0: there is none.
    """
    results = {"original": wanted, **got}
    if rate:
        waves = {name: np.concatenate([result["wave"] for result in each]) for name, each in results.items()}
        first = {
            name: spectra.log_mel_of_sounds(each[: samples.SHOWN_SOUNDS], rate=rate) for name, each in waves.items()
        }
        return samples.shown_spectra(first, list(got), rate=rate, count=len(waves["original"]))
    pictures = {name: found for name, each in results.items() if (found := pictures_of(each)) is not None}
    return [
        record.Samples(
            target=name,
            original_png=pictures["original"],
            candidate_png=pictures[name],
            caption="the whole job: the original's results and those of the engines, from the same noise",
        )
        for name in got
        if {"original", name} <= pictures.keys()
    ]


def pictures_of(results: Sequence[Arrays]) -> str | None:
    """All pictures among some results in one PNG; None where something else is among them."""
    found = [array[:, 0] if array.ndim == 5 else array for result in results for array in result.values()]
    if any(each.ndim != 4 or each.shape[-1] not in (1, 3) for each in found):
        return None
    return png_grid(np.concatenate(found).transpose(0, 3, 1, 2) * 2 - 1)


def report_of(
    recipe: Recipe,
    done: Mapping[str, record.Report],
    targets: Sequence[record.TargetRecord],
    pictures: Sequence[record.Samples],
    notes: Sequence[str],
    seconds: float,
) -> record.Report:
    """One report of all parts and of what they do together."""
    models = [report.model for report in done.values()]
    gates = judge_gates([gate for gate in recipe.gates if gate.part == WHOLE], targets)
    gates += [
        gate.model_copy(update={"target": f"{part}.{gate.target}"})
        for part, report in done.items()
        for gate in report.gates
    ]
    parts = [of_part(part, target) for part, report in done.items() for target in report.targets]
    # A whole job that nobody asks for may be left out; one that was run and is faulty may not.
    judged = [*(target for target in targets if target.faults), *parts]
    return record.Report(
        model=record.ModelRecord(
            name=sources.short_name(recipe.model),
            weights=f"those of {len(models)} networks",
            parameter_count=sum(model.parameter_count for model in models),
            macs=None,
            bytes=sum(model.bytes for model in models),
        ),
        parts=[
            record.PartRecord(name=part, model=report.model, verdict=report.verdict) for part, report in done.items()
        ],
        verdict=pipeline.verdict(gates, judged),
        steps=[step.model_copy(update={"part": part}) for part, report in done.items() for step in report.steps],
        targets=[*targets, *parts],
        gates=gates,
        samples=[
            *pictures,
            *(
                each.model_copy(update={"target": f"{part}.{each.target}"})
                for part, report in done.items()
                for each in report.samples
            ),
        ],
        validation=alike({part: report.validation for part, report in done.items()}),
        environment=environment.describe(),
        versions=environment.versions(),
        seconds=round(seconds, 3),
        notes=[*notes, *(f"{part}: {note}" for part, report in done.items() for note in report.notes)],
    )


def of_part(part: str, target: record.TargetRecord) -> record.TargetRecord:
    """A part's target as the whole report names it; its files by their paths from there."""
    return target.model_copy(
        update={
            "name": f"{part}.{target.name}",
            "part": part,
            "folders": [f"{part}/{place}" for place in target.folders],
            "files": {f"{part}/{path}": size for path, size in target.files.items()},
        }
    )


def alike(each: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How parts were validated: what is the same for all once, and what is not for each part."""
    keys = list(dict.fromkeys(key for settings in each.values() for key in settings))
    found: dict[str, Any] = {}
    for key in keys:
        values = {part: settings[key] for part, settings in each.items() if key in settings}
        same = len(values) == len(each) and all(value == next(iter(values.values())) for value in values.values())
        found[key] = next(iter(values.values())) if same else "; ".join(f"{p}: {v}" for p, v in values.items())
    return found


def write(recipe: Recipe, report: record.Report, folder: Path, lies: Path) -> None:
    """What stands beside the parts: recipe, README, report and manifest."""
    (folder / "recipe.toml").write_text(recipe.moved(lies).as_toml())
    (folder / "README.md").write_text(deploying.render_pipeline(report))
    record.write(report, folder / artifact.REPORT)
    rendering.write_all(report, folder)
    content = {"version": __version__, "model": report.model.model_dump(), "versions": report.versions}
    artifact.write_manifest(folder, {**content, "parts": [part.name for part in report.parts]})


def load_pipeline(
    folder: str | Path, target: str | None = None, *, source: str | Path | None = None, trust_code: bool = False
) -> Any:
    """The pipeline that an artifact was made from, with its engines in the place of its networks.

    Args:
        folder: what ``enginewright export`` wrote of a pipeline.
        target: which engines; by default, for each part, the first that runs here.
        source: the folder that it was made from, if that was moved; it holds what is no network, such as tokenizers.
        trust_code: run code that an artifact's model is made by.

    Raises:
        ToolchainError: it is no artifact of a pipeline, or is damaged, or an engine of it does not run here.
    """
    folder = Path(folder)
    if not artifact.read_manifest(folder).get("parts"):
        raise ToolchainError(f"{str(folder)!r} holds one network", help="load it with enginewright.load")
    recipe = read(folder / "recipe.toml")
    if source is not None:
        recipe = origin.at_place(recipe, Path(source))
    settings = recipe.head.job or Job()
    job = sources.job_of(recipe.model, **settings.model_dump(exclude={"skip"}))
    return job.assemble(engines(job, folder, target, trust_code=trust_code))
