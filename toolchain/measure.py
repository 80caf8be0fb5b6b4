"""Original and engines on the same inputs: outputs, whole sampling runs, and time; then what the gates make of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from enginewright.at_sizes import SEED as SIZES_SEED
from enginewright.at_sizes import Again, SizedCall, again_with, answerable, at_one_size, eager, faults_of
from enginewright.calibration import VALIDATION_SEED
from enginewright.ground.distance import relative_l2
from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Arrays
from enginewright.originals import originals_beside
from enginewright.progress import Progress
from enginewright.recipe import Validation
from enginewright.reports import record
from enginewright.samples import shown
from enginewright.sources.contract import Model
from enginewright.validation import latency
from enginewright.validation.contract import Workload, WorkloadMetric
from enginewright.validation.fidelity import OutputFidelity, compare, dead_columns, empty, non_finite, worst
from enginewright.validation.gates import ORIGINAL, GateBound, judge
from enginewright.validation.inputs import draw
from enginewright.validation.metrics import load_metrics

STEADY = 1e-4
"""Relative L2 distance of two answers of a steady original: the order of float32 additions may change, no more."""


def measure(
    model: Model,
    original: Runner,
    runners: Mapping[str, Runner],
    settings: Validation,
    *,
    seed: int,
    threads: int,
    progress: Progress,
    sized: Sequence[SizedCall] = (),
    untouched: Model | None = None,
    half: Runner | None = None,
) -> tuple[dict[str, dict[str, Any]], list[record.Samples]]:
    """Measure every runner beside the original.

    Args:
        model: what they are called as.
        original: what they are held against.
        runners: by name.
        settings: how much is measured.
        seed: of the recipe.
        threads: of every runner, for the record.
        progress: told of each stage.
        sized: calls at other than typical sizes, with the original's answers.
        untouched: the original where that is not what the runners are held against; compared with as well.
        half: what they are to compute in half precision, in PyTorch; where a CPU computes that in fp32.

    Returns:
        For each runner the fields of its ``TargetRecord`` that were measured, and pictures for the report.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in runners}
    inputs = validation_calls(model, settings.calls, seed)
    with progress.stage("compare outputs"):
        inputs = answerable(model, original, inputs)
        wanted = answers_of(original, inputs)
        for name, runner in runners.items():
            found[name] |= outputs_of(runner, inputs, wanted, mask=model.mask)
        if half is not None:
            tried = in_half(half, inputs, wanted, model.mask)
            for name in runners:
                found[name] |= tried
    if untouched is not None:
        with progress.stage("compare with the untouched original"):
            plain = eager(untouched, threads)
            calls = answerable(untouched, plain, validation_calls(untouched, settings.calls, seed))
            answers, taken = answers_of(plain, calls), {spec.name for spec in model.inputs}
            for name, runner in runners.items():
                found[name] |= beside_untouched(runner, taken, calls, answers, untouched.mask)
    if sized:
        with progress.stage("compare outputs at other sizes"):
            again = again_with(model, original, seed + SIZES_SEED)
            for name, runner in runners.items():
                if not found[name].get("faults"):
                    found[name] |= at_sizes_of(runner, sized, found[name].get("fidelity", []), again)
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


def in_half(half: Runner, inputs: Sequence[Arrays], wanted: Sequence[Arrays], mask: str) -> dict[str, Any]:
    """Fidelity of true half precision; a note where it could not be computed."""
    try:
        got = [half(call) for call in inputs]
    except ToolchainError as error:
        return {"notes": [f"half precision was not tried in PyTorch: {error.message}"]}
    if faults := non_finite(got):
        return {"faults": [f"in half precision, {fault}" for fault in faults]}
    found = compared(wanted, got, masks_of(mask, inputs), mask)
    return {"fidelity_in_half": found.get("fidelity", [])}


def beside_untouched(
    runner: Runner, taken: Collection[str], calls: Sequence[Arrays], wanted: Sequence[Arrays], mask: str
) -> dict[str, Any]:
    """Fidelity of one engine to the untouched original, on its own calls; inputs that the engine lacks are left out."""
    got = [runner({name: array for name, array in call.items() if name in taken}) for call in calls]
    found = {} if non_finite(got) else compared(wanted, got, masks_of(mask, calls), mask)
    return {"fidelity_to_original": found["fidelity"]} if found.get("fidelity") else {}


def validation_calls(model: Model, count: int, seed: int) -> list[Arrays]:
    """The calls that outputs are compared on; a recipe's seed and count always give the same ones."""
    return model.held_out(count, seed + VALIDATION_SEED)


def at_sizes_of(
    runner: Runner, sized: Sequence[SizedCall], fidelity: Sequence[record.Fidelity], again: Again
) -> dict[str, Any]:
    """What one engine does at other sizes; where it fails or strays is a fault."""
    typical = max((output.relative_l2 for output in fidelity), default=0.0)
    outcomes = [at_one_size(runner, call, typical, again) for call in sized]
    found: dict[str, Any] = {"sizes": [record.SizeCheck.model_validate(vars(each)) for each in outcomes]}
    return found | ({"faults": faults} if (faults := faults_of(outcomes)) else {})


def answers_of(original: Runner, inputs: Sequence[Arrays]) -> list[Arrays]:
    """What the original puts out for each call.

    Raises:
        ToolchainError: values that are not finite: no engine can be held against them.
    """
    answers = [original(call) for call in inputs]
    for number, (call, answer) in enumerate(zip(inputs, answers, strict=True), 1):
        if faults := non_finite([answer]):
            layer = first_non_finite(original, call)
            raise ToolchainError(
                f"the original model cannot be a reference: {faults[0]}, in validation call {number}",
                where=f"first in layer {layer}" if layer else None,
            )
    return answers


def refuse_unsteady(original: Runner, call: Arrays) -> None:
    """Raise when the original answers one call in two ways, beyond rounding: it draws random numbers."""
    first, second = (original(call) for _ in range(2))
    moved = {name: error for name in first if (error := distance(first[name], second[name])) > STEADY}
    if not moved:
        return
    name, error = max(moved.items(), key=lambda each: each[1])
    locate = getattr(original, "first_unsteady", None)
    layer = locate(call) if locate else ""
    raise ToolchainError(
        f"the original model cannot be a reference: output {name!r} of one and the same call differs by {error:.2g} of "
        "its size from one time to the next, so the model draws random numbers",
        where=f"first seen in the output of layer {layer}" if layer else None,
        help="give it the noise as an input (wrap it in py:FILE.py:FUNCTION), or switch off what draws: a dropout that "
        "stays in training mode, a random mask; --no-validate exports it without comparing anything",
    )


def distance(a: Array, b: Array) -> float:
    """Relative L2 distance; infinite where the shapes differ."""
    return relative_l2(a, b) if a.shape == b.shape else math.inf


def masks_of(mask: str, inputs: Sequence[Arrays]) -> list[Array | None]:
    """Which rows of each call are real, where the model has an input that says so."""
    return [call.get(mask) for call in inputs]


def outputs_of(runner: Runner, inputs: Sequence[Arrays], wanted: Sequence[Arrays], *, mask: str = "") -> dict[str, Any]:
    """Fidelity of one engine. Outputs that are not finite are a fault, with the layer where they begin; so are columns
    that never change. Where not one output has an element, there is a reason instead of figures.
    """
    got = [runner(call) for call in inputs]
    faults = non_finite(got)
    if faults:
        bad = next(call for call, out in zip(inputs, got, strict=True) if non_finite([out]))
        layer = first_non_finite(runner, bad)
        return {"faults": [f"{fault}; first in layer {layer}" if layer else fault for fault in faults]}
    return compared(wanted, got, masks_of(mask, inputs), mask)


def compared(
    wanted: Sequence[Arrays], got: Sequence[Arrays], masks: Sequence[Array | None], mask: str = ""
) -> dict[str, Any]:
    """Fields of a ``TargetRecord`` about finite outputs beside the original's."""
    try:
        found: dict[str, Any] = {"fidelity": [as_record(output, mask) for output in compare(wanted, got, masks)]}
    except ToolchainError as error:
        return {"faults": [error.message]}
    if dead := dead_columns(wanted, got, masks):
        found["faults"] = dead
    nothing = [f"output {name!r} is empty in every call" for name in empty(wanted, masks)]
    if nothing and not found["fidelity"]:
        found["reason"] = f"{'; '.join(nothing)}: nothing was compared"
    elif nothing:
        found["not_compared"] = nothing
    return found


def first_non_finite(runner: Runner, inputs: Arrays) -> str:
    """The layer where a runner's values stop being finite, where the runner can tell."""
    locate = getattr(runner, "first_non_finite", None)
    return locate(inputs) if locate else ""


def as_record(output: OutputFidelity, mask: str = "") -> record.Fidelity:
    """Fidelity of one output for the report.

    The infinite signal-to-noise ratio of equal outputs is null there; other infinities stand as they are.
    """
    worst_of = null_if_equal(output.worst)
    return record.Fidelity.model_validate(
        {
            "output": output.output,
            **{name: value for name, value in worst_of.items() if name in record.FIGURES},
            "more": {name: value for name, value in worst_of.items() if name not in record.FIGURES},
            "calls": output.calls,
            "worst_call": output.worst_call,
            "median": null_if_equal(output.median),
            "mask": mask if output.masked else "",
            "everywhere": null_if_equal(output.everywhere),
        }
    )


def null_if_equal(figures: Mapping[str, float]) -> dict[str, float | None]:
    """The same figures, without the infinite ``snr_db`` of equal outputs."""
    return {name: None if name == "snr_db" and value == math.inf else value for name, value in figures.items()}


def sampling(
    task: Workload,
    original: Runner,
    runners: Mapping[str, Runner],
    settings: Validation,
    *,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, list[record.Quality]], list[record.Samples]]:
    """Whole runs from the same noise or prompts, judged; and pictures, where they give some."""
    count = settings.samples or task.samples
    drawn: dict[str, Any] = {}
    everyone = {"original": original, **runners}
    for number, (name, runner) in enumerate(everyone.items()):
        text = f"drawing {count} samples with {name}, {number + 1} of {len(everyone)}"
        drawn[name] = task.drawn(task.sample(telling(runner, task, count, text, progress), count, seed))
    metrics = metrics_of(task)
    quality = {
        name: [quality_of(metric, label, task, drawn["original"], drawn[name]) for label, metric in metrics.items()]
        for name in runners
    }
    return quality, shown(task, drawn, list(runners), count)


def metrics_of(task: Workload) -> dict[str, WorkloadMetric]:
    """The metrics of a kind of job, by name."""
    metrics = load_metrics()
    return {
        n: metric
        for n, metric in metrics.items()
        if isinstance(metric, WorkloadMetric) and isinstance(task, metric.workload)
    }


def telling(runner: Runner, task: Workload, count: int, text: str, progress: Progress) -> Runner:
    """A runner that tells of each call how far a sampling run is, where the task knows how many it makes."""
    progress.say(text)
    if task.calls is None:
        return runner
    total, made = task.calls(count), itertools.count()

    def call(inputs: Arrays) -> Arrays:
        number = next(made)
        if number < total:
            progress.count(number, total, text)
        else:
            progress.say(f"{text}: call {number + 1}")
        return runner(inputs)

    return call


def quality_of(metric: WorkloadMetric, name: str, task: Workload, original: Any, drawn: Any) -> record.Quality:
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
    """Paired latency of every runner, each beside the original on its own device."""
    originals, beside = originals_beside(original, runners, call)
    samples = latency.time_in_turns(
        {**originals, **runners}, call, warm_up=settings.warm_up, samples=settings.rounds, seed=seed, say=progress.say
    )
    found = {}
    for name in runners:
        own, doubts = samples[beside[name].original], beside[name].doubts
        summary = latency.summarise(own, samples[name], seed=seed)
        found[name] = record.Latency(
            samples_s=samples[name].wall_s,
            original_samples_s=own.wall_s,
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
            warnings=[*doubts, *summary.warnings, *slower(summary)],
            unsafe=[*doubts, *summary.unsafe],
            original_low_s=summary.original_low_s,
            original_high_s=summary.original_high_s,
            cpu_s=samples[name].cpu_s,
            original_cpu_s=own.cpu_s,
            interrupted=samples[name].interrupted,
            original_interrupted=own.interrupted,
            device=beside[name].device,
            original_device=beside[name].original_device,
            copies_timed=beside[name].copies_timed,
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
            interval, unsafe = doubt_of(bound.name, target)
            verdict, reason = judge(bound, value, reason, interval=interval, unsafe=unsafe)
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
        return fidelity_of(key, [*target.fidelity, *(target.fidelity_in_half if target.fidelity else ())], reason)
    if kind == ORIGINAL:
        return fidelity_of(key, target.fidelity_to_original or target.fidelity, reason)
    if kind == "quality":
        for figure in target.quality:
            if figure.name == key:
                return figure.value, figure.reason
        return None, reason if not target.fidelity else "the model has no sampling task"
    if kind == "latency":
        return (getattr(target.latency, key), "") if target.latency else (None, reason)
    return (float(target.bytes), "") if target.bytes else (None, reason)


def fidelity_of(key: str, outputs: Sequence[record.Fidelity], reason: str) -> tuple[float | None, str]:
    """The worst of a metric over the outputs; null stands for equal outputs in ``snr_db``, else for not measured."""
    values = [output.value(key) for output in outputs]
    if not values:
        return None, reason
    if key == "snr_db":
        values = [math.inf if value is None else value for value in values]
    if None in values:
        return None, f"{outputs[values.index(None)].output} has no {key}"
    return worst(load_metrics()[key], [value for value in values if value is not None]), ""


def doubt_of(name: str, target: record.TargetRecord) -> tuple[tuple[float, float] | None, str]:
    """The interval of a figure that a gate names, where it has one; and why nothing may rest on it, or nothing."""
    if name.startswith("fidelity"):
        return None, target.doubt
    if target.latency is None or not name.startswith("latency."):
        return None, ""
    interval = (target.latency.ratio_low, target.latency.ratio_high) if name == "latency.ratio" else None
    return interval, "; ".join(target.latency.unsafe)
