"""A committed baseline of figures, and what has moved since.

A figure's key says where it is from: ``onnxruntime/fidelity.cosine/logits``, ``onnxruntime/latency.ratio``,
``model/parameter_count``. Each carries its own tolerance and direction, so that a baseline can be read, reviewed and
edited by hand.

Times come with intervals, and intervals are compared: a slow-down is one when the lower end now lies above the upper
end then, by more than the tolerance. The ratio to the original, timed in turns with it, cancels what slows both: so the
original's own time is a figure too, ``latency.original_median_s``, and what the original itself scores, where the model
can tell. Neither kind of time is compared between machines, and an unsafe one is no figure at all.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from enginewright.ground.errors import ToolchainError, invalid, raise_faults
from enginewright.ground.reading import read_json
from enginewright.ground.runner import CPU
from enginewright.ground.writing import write_where_told
from enginewright.validation.contract import Metric
from enginewright.validation.metrics import load_metrics

SCHEMA: Literal[1] = 1
Verdict = Literal["same", "improved", "regressed", "missing", "new", "not_comparable"]

_LATENCY = ("latency.ratio", "latency.original_median_s")
_SEVERITY: tuple[Verdict, ...] = ("regressed", "missing", "not_comparable", "improved", "new", "same")


class Part(BaseModel):
    """A piece of the baseline; unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tolerance(Part):
    """How far a figure may move and still be the same: the wider of the two. ``absolute`` 0 means exact."""

    absolute: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    relative: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something(self) -> Tolerance:
        if self.absolute is None and self.relative is None:
            raise ValueError("a tolerance needs 'absolute' or 'relative'")
        return self

    def allowed(self, value: float) -> float:
        """The widest move from ``value``, in its unit."""
        return max(self.absolute or 0.0, (self.relative or 0.0) * abs(value))

    def __str__(self) -> str:
        """For people: ``25 % or 1e-05``, ``exact``."""
        parts = [f"{self.relative * 100:g} %"] if self.relative else []
        parts += [f"{self.absolute:g}"] if self.absolute else []
        return " or ".join(parts) or "exact"


class Figure(Part):
    """A number with its tolerance and direction; as measured it may be NaN or infinite, in a baseline not.

    ``low`` and ``high`` are its 95 % interval, where it has one.
    """

    value: float
    tolerance: Tolerance
    higher_is_better: bool
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true figure lies; the value twice where nothing else is known."""
        return (self.value if self.low is None else self.low), (self.value if self.high is None else self.high)


class Baseline(Part):
    """What the figures were, and the machine they were measured on."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    model: str
    figures: dict[str, Figure]
    environment: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure, then and now; ``None`` where it has no value."""

    key: str
    verdict: Verdict
    baseline: float | None
    current: float | None
    tolerance: Tolerance
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether this must fail a check: it got worse, or it can no longer be seen."""
        return self.verdict in ("regressed", "missing")


EXACT = Tolerance(absolute=0)
"""Parameters and MACs: counted, not measured."""

BYTES = Tolerance(relative=0.02)
"""Metadata and padding change with the exporter's version; a layer that was lost or doubled is far above this."""

LATENCY = Tolerance(relative=0.03)
"""Beyond both intervals, for what differs between two runs and not within one, such as where memory lies."""

ORIGINAL = Tolerance(relative=0.1)
"""An absolute time moves with the clock of the processor too, which the ratio cancels."""

SEEN = 0.1
"""The slow-down that a comparison must be able to show before it may say *same*."""

GIVEN = Tolerance(relative=0.01)
"""For figures of the user's own until they set a better one in the baseline."""


def figures_from(record: Mapping[str, Any], given: Mapping[str, Figure] | None = None) -> dict[str, Figure]:
    """Every figure of a parsed ``report.json`` with its default tolerance; what was not measured is left out.

    So are times that the record calls unsafe: see ``left_out``. ``given`` are figures of the user's own, by name.
    """
    figures = dict(_model_figures(record)) | {f"given/{name}": figure for name, figure in (given or {}).items()}
    for name, target in _named_targets(record):
        figures |= {f"{name}/{key}": figure for key, figure in _target_figures(target)}
    return figures


def figure_given(text: str) -> tuple[str, Figure]:
    """Read a figure of the user's own, ``accuracy=0.913`` or ``wer=0.12,lower``: name, value, better when lower.

    Raises:
        ToolchainError: not of that form, or no finite number.
    """
    name, equals, rest = text.partition("=")
    number, comma, direction = rest.partition(",")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name.strip() or not equals or not math.isfinite(value) or (comma and direction.strip() != "lower"):
        raise ToolchainError(
            f"{text!r} is no figure",
            where="--figure",
            help="write NAME=NUMBER, such as accuracy=0.913; NAME=NUMBER,lower where less is better",
        )
    return name.strip(), Figure(value=value, tolerance=GIVEN, higher_is_better=not comma)


def left_out(record: Mapping[str, Any]) -> dict[str, str]:
    """Figures that were measured and are none, because the record itself calls them unsafe; and why."""
    return {
        f"{name}/{key}": "; ".join(target["latency"]["unsafe"])
        for name, target in _named_targets(record)
        if target.get("latency") and target["latency"].get("unsafe")
        for key in _LATENCY
    }


def baseline_from(
    record: Mapping[str, Any], *, keep: Baseline | None = None, given: Mapping[str, Figure] | None = None
) -> Baseline:
    """A baseline of this run, without the figures of ``left_out``.

    Args:
        record: a parsed ``report.json``.
        given: figures of the user's own, by name.
        keep: an older baseline, whose tolerances (set by hand, perhaps) stay.

    Raises:
        ToolchainError: a figure is not finite.
    """
    figures = figures_from(record, given)
    for key in figures.keys() & (keep.figures.keys() if keep else set()):
        assert keep is not None
        figures[key] = figures[key].model_copy(update={"tolerance": keep.figures[key].tolerance})
    content = {
        "schema": SCHEMA,
        "model": record["model"]["name"],
        "figures": {key: figure.model_dump() for key, figure in figures.items()},
        "environment": _environment(record),
    }
    return _validated(content, where="report.json")


def check(baseline: Baseline, record: Mapping[str, Any], given: Mapping[str, Figure] | None = None) -> list[Comparison]:
    """Hold a run against the baseline, whose tolerances and directions count; worst news first.

    A latency from another CPU or GPU, another number of threads or other input shapes is ``not_comparable``; so is one
    that is unsafe, one whose interval is too wide to tell, and worse fidelity in other 8-bit arithmetic.

    Raises:
        ToolchainError: the baseline is another model's.
    """
    if baseline.model != record["model"]["name"]:
        raise ToolchainError(
            f"the baseline is of {baseline.model!r}, the report of {record['model']['name']!r}",
            help="give the baseline of this model, or write one with --update",
        )
    now = figures_from(record, given)
    comparisons = [_compare(key, then, now.get(key), baseline, record) for key, then in baseline.figures.items()]
    comparisons += [
        Comparison(key=key, verdict="new", baseline=None, current=figure.value, tolerance=figure.tolerance)
        for key, figure in now.items()
        if key not in baseline.figures
    ]
    return sorted(comparisons, key=lambda each: (_SEVERITY.index(each.verdict), each.key))


def read(path: Path) -> Baseline:
    """Read a baseline.

    Raises:
        ToolchainError: not there, not JSON, another schema, or a key that is missing, unknown or wrong.
    """
    content = read_json(
        path,
        what=path.name,
        absent=f"there is no baseline at {path.name!r}",
        help="write one with --update",
        finite=False,
    )
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ToolchainError(f"{path.name} has schema {found!r}; this version reads {SCHEMA}", where=str(path))
    return _validated(content, where=str(path))


def write(path: Path, baseline: Baseline) -> None:
    """Write a baseline in one go: after a crash the old file is still whole. Keys are sorted, for small diffs.

    Raises:
        ToolchainError: the place cannot be written.
    """
    content = baseline.model_dump(mode="json", by_alias=True, exclude_none=True)
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_where_told(path, text, what="the baseline")


def render_table(comparisons: Sequence[Comparison]) -> str:
    """Aligned plain text, one line a figure, and a line of totals."""
    rows = [("verdict", "figure", "baseline", "now", "change", "tolerance", "")]
    rows += [
        (
            each.verdict.replace("_", " "),
            each.key,
            _number(each.baseline),
            _number(each.current),
            _change(each.baseline, each.current),
            str(each.tolerance),
            each.reason,
        )
        for each in comparisons
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = Counter(each.verdict for each in comparisons)
    totals = [f"{counts[verdict]} {verdict.replace('_', ' ')}" for verdict in _SEVERITY if counts[verdict]]
    return "\n".join([*lines, ", ".join(totals) or "nothing to compare"])


def _model_figures(record: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Counts after the last step; the model's own when no step ran. Of a pipeline those of each part."""
    for part in record.get("parts") or [{"name": "", "model": record["model"]}]:
        after = {key: part["model"][key] for key in ("parameter_count", "macs", "bytes")}
        if own := [step for step in record["steps"] if step.get("part", "") == part["name"]]:
            after = {key: own[-1][key]["after"] for key in after}
        for key, value in after.items():
            if value is not None:
                yield f"{part['name'] or 'model'}/{key}", _lower(value, BYTES if key == "bytes" else EXACT)


def _named_targets(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Targets by name; the second of one name, built with other options, is ``name#2``."""
    seen: Counter[str] = Counter()
    for target in record["targets"]:
        name = target["name"]
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), target


def _target_figures(target: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    if target.get("bytes") is not None:
        yield "bytes", _lower(target["bytes"], BYTES)
    if (timed := target.get("latency")) and not timed.get("unsafe"):
        yield _LATENCY[0], _timed(timed["ratio"], timed["ratio_low"], timed["ratio_high"], LATENCY)
        if timed.get("original_low_s") is not None:
            ends = timed["original_low_s"], timed["original_high_s"]
            yield _LATENCY[1], _timed(timed["original_median_s"], *ends, ORIGINAL)
    metrics = load_metrics()
    for entry in target.get("fidelity") or []:
        for name, metric in metrics.items():
            value = entry.get(name, (entry.get("more") or {}).get(name))
            if metric.kind == "fidelity" and metric.kept and value is not None:
                yield f"fidelity.{name}/{entry['output']}", _figure(value, metric)
    for entry in target.get("quality") or []:
        name = entry["name"].removeprefix("quality.")
        known = metrics.get(name)
        if entry["value"] is None or known is None or not known.kept:
            continue
        yield f"quality.{name}", _figure(entry["value"], known)
        if entry.get("original") is not None and not known.compares:
            yield f"quality.{name}/original", _figure(entry["original"], known)


def _figure(value: float, metric: Metric) -> Figure:
    """A value of a metric, with the metric's own direction and tolerance."""
    tolerance = Tolerance(relative=metric.relative_tolerance, absolute=metric.absolute_tolerance)
    return Figure(value=value, tolerance=tolerance, higher_is_better=metric.higher_is_better)


def _lower(value: float, tolerance: Tolerance) -> Figure:
    return Figure(value=value, tolerance=tolerance, higher_is_better=False)


def _timed(value: float, low: float, high: float, tolerance: Tolerance) -> Figure:
    return Figure(value=value, tolerance=tolerance, higher_is_better=False, low=low, high=high)


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's environment; and of each timed target the threads, the input shapes, and its device if no CPU."""
    timed = {name: target["latency"] for name, target in _named_targets(record) if target.get("latency")}
    threads = {name: each["threads"] for name, each in timed.items()}
    shapes = {name: each["shapes"] for name, each in timed.items() if each.get("shapes")}
    devices = {name: each["device"] for name, each in timed.items() if each.get("device", CPU) != CPU}
    more = {"latency_shapes": shapes, "latency_devices": devices}
    return {
        **record["environment"],
        "latency_threads": threads,
        **{key: by_target for key, by_target in more.items() if by_target},
    }


def _compare(key: str, then: Figure, now: Figure | None, baseline: Baseline, record: Mapping[str, Any]) -> Comparison:
    verdict, reason = _verdict(then, now)
    environment = _environment(record)
    target, _, name = key.partition("/")
    if name in _LATENCY and (unsafe := left_out(record).get(key)):
        verdict, reason = "not_comparable", unsafe
    elif now is None:
        reason = _why_missing(key, record)
    elif name in _LATENCY and not math.isnan(now.value + sum(now.interval)):
        verdict, reason = _verdict_of_times(then, now)
        doubt = _other_machine(target, baseline.environment, environment)
        verdict, reason = ("not_comparable", doubt) if doubt else (verdict, reason)
    elif verdict == "regressed" and name.startswith(("fidelity.", "quality.")):
        doubt = _other_arithmetic(baseline.environment, environment)
        verdict, reason = ("not_comparable", doubt) if doubt else (verdict, reason)
    return Comparison(
        key=key,
        verdict=verdict,
        baseline=then.value,
        current=now.value if now else None,
        tolerance=then.tolerance,
        reason=reason,
    )


def _verdict(then: Figure, now: Figure | None) -> tuple[Verdict, str]:
    if now is None:
        return "missing", ""
    if math.isnan(now.value + sum(now.interval)):
        return "regressed", "not a number"
    gain = (now.value - then.value) * (1 if then.higher_is_better else -1)
    if abs(gain) <= then.tolerance.allowed(then.value) * (1 + 1e-9):  # 0.98 - 0.96 is just above 0.02
        return "same", ""
    return ("improved", "") if gain > 0 else ("regressed", "")


def _verdict_of_times(then: Figure, now: Figure) -> tuple[Verdict, str]:
    """Compare the intervals of two times, or say that they are too wide to tell."""
    (then_low, then_high), (now_low, now_high) = then.interval, now.interval
    allowed = then_high + then.tolerance.allowed(then_high)
    if now_low > allowed:
        return "regressed", ""
    if now_high < then_low - then.tolerance.allowed(then_low):
        return "improved", ""
    least = allowed * now.value / (now_low * then.value) if now_low > 0 and then.value > 0 else math.inf
    relative = then.tolerance.allowed(then.value) / then.value if then.value > 0 else 0.0
    if now.value > allowed:
        return "not_comparable", f"its interval, {now_low:.3g} to {now_high:.3g}, reaches the allowed {allowed:.3g}"
    if least - 1 > max(SEEN, 2 * relative) * (1 + 1e-9):
        return "not_comparable", (
            f"the intervals are too wide to tell: a slow-down below {least - 1:.0%} could not be seen; "
            "time more samples"
        )
    return "same", ""


_MACHINE = {"cpu": "CPU", "cpu_id": "CPU", "cores": "number of cores", "gpu": "GPU"}
"""What must be the same for times to be compared, and what it is called."""


def _other_machine(target: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why a latency of then says nothing about one of now; empty when it does."""
    if not then.get("cpu") or not now.get("cpu"):
        return "the CPU model is not recorded on both sides"
    if ("cpu_id" in then) != ("cpu_id" in now):
        return "the CPU's family, model, stepping and flags are not recorded on both sides"
    for part, word in _MACHINE.items():
        if then.get(part) != now.get(part):
            return f"another {word}: {then.get(part)} then, {now.get(part)} now"
    threads, shapes = (
        _of_target("latency_threads", target, then, now),
        _of_target("latency_shapes", target, then, now),
    )
    if threads[0] != threads[1]:
        return f"another number of threads: {threads[0]} then, {threads[1]} now"
    devices = [device or CPU for device in _of_target("latency_devices", target, then, now)]
    if devices[0] != devices[1]:
        return f"another device: {devices[0]} then, {devices[1]} now"
    return "" if shapes[0] == shapes[1] or None in shapes else f"other inputs: {shapes[0]} then, {shapes[1]} now"


def _of_target(what: str, target: str, *sides: Mapping[str, Any]) -> list[Any]:
    """What each side's environment says of one target; None where it says nothing."""
    tables = [side.get(what) for side in sides]
    return [table.get(target) if isinstance(table, Mapping) else None for table in tables]


def _other_arithmetic(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why fidelity on this CPU need not be that of the other: one of the two halves 8-bit weights; or empty."""
    sides = [side.get("int8_saturates") for side in (then, now)]
    words = {True: "saturates", False: "does not saturate"}
    if sides[0] == sides[1] or not all(side in words for side in sides):
        return ""
    return f"8-bit arithmetic here {words[bool(sides[1])]}, the baseline's {words[bool(sides[0])]}; gates still hold it"


def _why_missing(key: str, record: Mapping[str, Any]) -> str:
    """The reason that the record gives for a figure it lacks."""
    if key.startswith("given/"):
        return f"give it again: --figure {key.removeprefix('given/')}=NUMBER"
    for name, target in _named_targets(record):
        if key.startswith(f"{name}/"):
            for entry in target.get("quality") or []:
                if key.endswith(entry["name"]) and entry.get("reason"):
                    return str(entry["reason"])
            return target.get("reason") or "not measured in this run"
    return "not in this run"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    whole = math.isfinite(value) and value == int(value) and abs(value) < 1e15
    return f"{int(value):,}" if whole else f"{value:.6g}"


def _change(then: float | None, now: float | None) -> str:
    return "" if not then or now is None else f"{(now - then) / abs(then):+.1%}"


def _validated(content: Mapping[str, Any], *, where: str) -> Baseline:
    try:
        baseline = Baseline.model_validate(content)
    except ValidationError as error:
        raise_faults(invalid(error, what="the baseline", where=where))
        raise AssertionError("unreachable") from error
    raise_faults(
        [
            ToolchainError(f"a baseline holds finite figures; {key} is {figure.value}", where=where)
            for key, figure in baseline.figures.items()
            if not all(map(math.isfinite, (figure.value, *figure.interval)))
        ]
    )
    if not baseline.figures:
        raise ToolchainError("the baseline holds no figures, so nothing could fail", where=where)
    return baseline
