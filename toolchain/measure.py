"""Original and engines on the same inputs: outputs, whole sampling runs, and time; then what the gates make of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from reports import record
from reports.pictures import png_grid
from toolchain.calibration import VALIDATION_SEED
from toolchain.errors import ToolchainError
from toolchain.progress import Progress
from toolchain.recipe import Validation
from toolchain.sources.contract import Model
from validation import latency
from validation.contract import Drawn, Runner, SampleMetric, SamplingTask
from validation.fidelity import OutputFidelity, compare, non_finite
from validation.gates import GateBound, judge
from validation.inputs import Arrays, draw
from validation.metrics import load_metrics

SHOWN = 20
"""Samples that the report shows."""


def measure(
    model: Model,
    original: Runner,
    runners: Mapping[str, Runner],
    settings: Validation,
    *,
    seed: int,
    threads: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, Any]], list[record.Samples]]:
    """Measure every runner beside the original.

    Returns:
        For each runner the fields of its ``TargetRecord`` that were measured, and pictures for the report.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in runners}
    inputs = model.batches(settings.calls, seed + VALIDATION_SEED)
    with progress.stage("compare outputs"):
        wanted = [original(call) for call in inputs]
        for name, runner in runners.items():
            found[name] |= outputs_of(runner, inputs, wanted)
    fit = {name: runner for name, runner in runners.items() if not found[name].get("faults")}
    pictures: list[record.Samples] = []
    if model.task is not None:
        with progress.stage("compare whole sampling runs"):
            quality, pictures = sampling(model.task, original, fit, settings, seed=seed, progress=progress)
            for name in fit:
                found[name]["quality"] = quality[name]
    with progress.stage("time, original and engines in turns"):
        call = draw(model.inputs, seed=seed + VALIDATION_SEED, sizes=settings.batch)
        for name, timed in time_all(original, fit, call, settings, seed, threads, progress).items():
            found[name]["latency"] = timed
    return found, pictures


def outputs_of(runner: Runner, inputs: Sequence[Arrays], wanted: Sequence[Arrays]) -> dict[str, Any]:
    """Fidelity of one engine; outputs that are not finite are a fault, with the layer where they begin."""
    got = [runner(call) for call in inputs]
    faults = non_finite(got)
    if faults:
        bad = next(call for call, out in zip(inputs, got, strict=True) if non_finite([out]))
        layer = first_non_finite(runner, bad)
        return {"faults": [f"{fault}; first in layer {layer}" if layer else fault for fault in faults]}
    try:
        return {"fidelity": [as_record(output) for output in compare(wanted, got)]}
    except ToolchainError as error:
        return {"faults": [error.message]}


def first_non_finite(runner: Runner, inputs: Arrays) -> str:
    """The layer where a runner's values stop being finite, where the runner can tell."""
    locate = getattr(runner, "first_non_finite", None)
    return locate(inputs) if locate else ""


def as_record(output: OutputFidelity) -> record.Fidelity:
    """Fidelity of one output for the report; an infinite signal-to-noise ratio (equal outputs) is null there."""
    figures = {name: value if math.isfinite(value) else None for name, value in output.worst.items()}
    return record.Fidelity.model_validate({"output": output.output, **figures})


def sampling(
    task: SamplingTask,
    original: Runner,
    runners: Mapping[str, Runner],
    settings: Validation,
    *,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, list[record.Quality]], list[record.Samples]]:
    """Whole runs from the same noise, judged."""
    count = settings.samples or task.samples
    drawn: dict[str, Drawn] = {}
    for number, (name, runner) in enumerate({"original": original, **runners}.items()):
        progress.count(number, len(runners) + 1, f"drawing {count} samples with {name}")
        pictures = task.sample(runner, count, seed)
        classes, features = task.read(pictures)
        drawn[name] = Drawn(pictures=pictures, classes=classes, features=features)
    metrics = {name: metric for name, metric in load_metrics().items() if isinstance(metric, SampleMetric)}
    quality = {
        name: [quality_of(metric, label, task, drawn["original"], drawn[name]) for label, metric in metrics.items()]
        for name in runners
    }
    shown = [
        record.Samples(
            target=name,
            original_png=png_grid(drawn["original"].pictures[:SHOWN]),
            candidate_png=png_grid(drawn[name].pictures[:SHOWN]),
            caption=f"the first {min(SHOWN, count)} of {count} samples, from the same noise",
        )
        for name in runners
    ]
    return quality, shown


def quality_of(metric: SampleMetric, name: str, task: SamplingTask, original: Drawn, drawn: Drawn) -> record.Quality:
    """One figure, of the engine and of the original itself; or why it could not be measured."""
    values: list[float | None] = []
    reason = ""
    for candidate in (drawn, original):
        try:
            value: float | None = metric.measure(task, original, candidate)
        except ToolchainError as error:
            value, reason = None, error.message
        values.append(value if value is not None and math.isfinite(value) else None)
    if values[0] is None and not reason:
        reason = "not finite: the samples are equal"
    return record.Quality(
        name=name,
        value=values[0],
        original=values[1],
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        reason=reason,
    )


def time_all(
    original: Runner,
    runners: Mapping[str, Runner],
    call: Arrays,
    settings: Validation,
    seed: int,
    threads: int,
    progress: Progress,
) -> dict[str, record.Latency]:
    """Paired latency of every runner."""
    everyone = {"original": getattr(original, "as_timed", lambda: original)(), **runners}
    samples = latency.time_interleaved(
        everyone, call, warm_up=settings.warm_up, samples=settings.rounds, seed=seed, say=progress.say
    )
    found = {}
    for name in runners:
        summary = latency.summarise(samples["original"], samples[name], seed=seed)
        found[name] = record.Latency(
            samples_s=samples[name],
            original_samples_s=samples["original"],
            median_s=summary.median_s,
            p90_s=summary.p90_s,
            p99_s=summary.p99_s,
            original_median_s=summary.original_median_s,
            spread=summary.spread,
            ratio=summary.ratio,
            ratio_low=summary.ratio_low,
            ratio_high=summary.ratio_high,
            warm_up=settings.warm_up,
            threads=threads,
            shapes={key: list(array.shape) for key, array in call.items()},
            warnings=[*summary.warnings, *slower(summary)],
        )
    return found


def slower(summary: latency.LatencySummary) -> list[str]:
    """Say in words that an engine is not faster."""
    if summary.ratio_low > 1:
        return [f"this engine is slower than the original: {summary.ratio:.2f} of its time"]
    return []


def judge_gates(bounds: Sequence[GateBound], targets: Sequence[record.TargetRecord]) -> list[record.Gate]:
    """Every bound on every target that it is asked of.

    A bound without a target is asked of every target that runs here; of none of them means not measured.
    """
    gates = []
    for bound in bounds:
        asked = [t for t in targets if bound.target in (None, t.name) and (bound.target or t.runnable or t.faults)]
        for target in asked:
            value, reason = value_of(bound.name, target)
            verdict, reason = judge(bound, value, reason)
            gates.append(
                record.Gate(
                    name=bound.name,
                    target=target.name,
                    bound=f"{bound.operator} {bound.bound:g}",
                    verdict=verdict,
                    value=value,
                    reason=reason,
                )
            )
        if not asked:
            gates.append(
                record.Gate(
                    name=bound.name,
                    target=bound.target or "any",
                    bound=f"{bound.operator} {bound.bound:g}",
                    verdict="not_measured",
                    reason="no target that runs on this machine",
                )
            )
    return gates


def value_of(name: str, target: record.TargetRecord) -> tuple[float | None, str]:
    """The figure that a gate names, the worst over outputs; or why there is none."""
    if target.faults:
        return None, target.faults[0]
    kind, _, key = name.partition(".")
    reason = target.reason or "validation was skipped"
    if kind == "fidelity":
        values = [getattr(output, key) for output in target.fidelity]
        if not values:
            return None, reason
        if key == "snr_db":
            return min((math.inf if v is None else v) for v in values), ""
        return (min(values) if key == "cosine" else max(values)), ""
    if kind == "quality":
        for figure in target.quality:
            if figure.name == key:
                return figure.value, figure.reason
        return None, reason if not target.fidelity else "the model has no sampling task"
    if kind == "latency":
        return (getattr(target.latency, key), "") if target.latency else (None, reason)
    return (float(target.bytes), "") if target.bytes else (None, reason)
