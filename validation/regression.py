"""A committed baseline of figures, and what has moved since.

A figure's key says where it is from: ``onnxruntime/fidelity.cosine/logits``, ``onnxruntime/latency.ratio``,
``model/parameter_count``. Each carries its own tolerance and direction, so that a baseline can be read, reviewed and
edited by hand. Absolute times are no figures: they belong to one machine on one day; the ratio to the original, timed
in turns with it, is one. Nor is ``snr_db``, which is ``relative_l2`` in decibels.
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

from toolchain.errors import ToolchainError, invalid, raise_faults
from toolchain.reading import read_json
from toolchain.writing import write_where_told
from validation.metrics import load_metrics

SCHEMA: Literal[1] = 1
Verdict = Literal["same", "improved", "regressed", "missing", "new", "not_comparable"]

_LATENCY = "latency.ratio"
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
    """A number with its tolerance and direction; as measured it may be NaN or infinite, in a baseline not."""

    value: float
    tolerance: Tolerance
    higher_is_better: bool


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

LATENCY = Tolerance(relative=0.3)
"""Wide, by judgement: other load on a shared machine slows two runtimes unequally, even when they take turns."""

ERRORS = Tolerance(relative=0.25, absolute=1e-5)
"""The floor is the order of float32 additions, which changes with threads and CPU; quantization is far above it."""

_BY_NAME = {
    # 1e-4 is an error of 1.4 % in relative_l2, which has its own, finer bound.
    "fidelity.cosine": Tolerance(absolute=1e-4),
    # A share of samples: at 0.98 of 300, two of its standard deviations are 0.016.
    "quality.judged_as_asked": Tolerance(absolute=0.02),
    # 1 dB is 12 % of the error's size.
    "quality.psnr_db": Tolerance(absolute=1.0),
}
_QUALITY = Tolerance(relative=0.25)
"""Other figures of sampling runs, the Frechet ones among them: covariances of a few hundred samples are noisy."""


def figures_from(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure of a parsed ``report.json`` with its default tolerance; what was not measured is left out."""
    figures = dict(_model_figures(record))
    for name, target in _named_targets(record):
        figures |= {f"{name}/{key}": figure for key, figure in _target_figures(target)}
    return figures


def baseline_from(record: Mapping[str, Any], *, keep: Baseline | None = None) -> Baseline:
    """A baseline of this run.

    Args:
        record: a parsed ``report.json``.
        keep: an older baseline, whose tolerances (set by hand, perhaps) stay.

    Raises:
        ToolchainError: a figure is not finite.
    """
    figures = figures_from(record)
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


def check(baseline: Baseline, record: Mapping[str, Any]) -> list[Comparison]:
    """Hold a run against the baseline, whose tolerances and directions count; worst news first.

    A latency ratio from another CPU or GPU model, or another number of threads, is ``not_comparable``; so is a slower
    one whose interval reaches what is allowed, and worse fidelity on a CPU whose 8-bit arithmetic is another.

    Raises:
        ToolchainError: the baseline is another model's.
    """
    if baseline.model != record["model"]["name"]:
        raise ToolchainError(
            f"the baseline is of {baseline.model!r}, the report of {record['model']['name']!r}",
            help="give the baseline of this model, or write one with --update",
        )
    now = figures_from(record)
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
    """Counts after the last step; the model's own when no step ran."""
    after = {key: record["model"][key] for key in ("parameter_count", "macs", "bytes")}
    if record["steps"]:
        after = {key: record["steps"][-1][key]["after"] for key in after}
    for key, value in after.items():
        if value is not None:
            yield f"model/{key}", _lower(value, BYTES if key == "bytes" else EXACT)


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
    if target.get("latency"):
        yield _LATENCY, _lower(target["latency"]["ratio"], LATENCY)
    compared = {name: each for name, each in load_metrics().items() if each.kind == "fidelity" and name != "snr_db"}
    for entry in target.get("fidelity") or []:
        for name, metric in compared.items():
            if entry.get(name) is not None:
                tolerance = _BY_NAME.get(f"fidelity.{name}", ERRORS)
                yield (
                    f"fidelity.{name}/{entry['output']}",
                    Figure(value=entry[name], tolerance=tolerance, higher_is_better=metric.higher_is_better),
                )
    for entry in target.get("quality") or []:
        if entry["value"] is not None:
            name = f"quality.{entry['name'].removeprefix('quality.')}"
            tolerance = _BY_NAME.get(name, _QUALITY)
            yield name, Figure(value=entry["value"], tolerance=tolerance, higher_is_better=entry["higher_is_better"])


def _lower(value: float, tolerance: Tolerance) -> Figure:
    return Figure(value=value, tolerance=tolerance, higher_is_better=False)


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's environment, and the threads of each timed target."""
    threads = {name: target["latency"]["threads"] for name, target in _named_targets(record) if target.get("latency")}
    return {**record["environment"], "latency_threads": threads}


def _compare(key: str, then: Figure, now: Figure | None, baseline: Baseline, record: Mapping[str, Any]) -> Comparison:
    verdict, reason = _verdict(then, now)
    environment = _environment(record)
    if now is None:
        reason = _why_missing(key, record)
    elif key.endswith(f"/{_LATENCY}"):
        target = key.removesuffix(f"/{_LATENCY}")
        doubt = _other_machine(target, baseline.environment, environment)
        if not doubt and verdict == "regressed":
            doubt = _within_interval(then, dict(_named_targets(record))[target]["latency"])
        verdict, reason = ("not_comparable", doubt) if doubt else (verdict, reason)
    elif verdict == "regressed" and not key.startswith("model/") and not key.endswith("/bytes"):
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
    if math.isnan(now.value):
        return "regressed", "not a number"
    gain = (now.value - then.value) * (1 if then.higher_is_better else -1)
    if abs(gain) <= then.tolerance.allowed(then.value) * (1 + 1e-9):  # 0.98 - 0.96 is just above 0.02
        return "same", ""
    return ("improved", "") if gain > 0 else ("regressed", "")


def _other_machine(target: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why a latency of then says nothing about one of now; empty when it does."""
    if not then.get("cpu") or not now.get("cpu"):
        return "the CPU model is not recorded on both sides"
    for part in ("cpu", "gpu"):
        if then.get(part) != now.get(part):
            return f"another {part.upper()}: {then.get(part)} then, {now.get(part)} now"
    counts = [side.get("latency_threads") for side in (then, now)]
    threads = [count.get(target) if isinstance(count, Mapping) else None for count in counts]
    return "" if threads[0] == threads[1] else f"another number of threads: {threads[0]} then, {threads[1]} now"


def _within_interval(then: Figure, latency: Mapping[str, Any]) -> str:
    """Why a slower ratio may be noise: its interval reaches down to what the baseline allows; empty when it is not."""
    allowed = then.value + then.tolerance.allowed(then.value)
    low, high = latency["ratio_low"], latency["ratio_high"]
    return f"its interval, {low:.3g} to {high:.3g}, reaches the allowed {allowed:.3g}" if low <= allowed else ""


def _other_arithmetic(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why fidelity on this CPU need not be that of the other: one of the two halves 8-bit weights; or empty."""
    sides = [side.get("int8_saturates") for side in (then, now)]
    words = {True: "saturates", False: "does not saturate"}
    if sides[0] == sides[1] or not all(side in words for side in sides):
        return ""
    return f"8-bit arithmetic here {words[bool(sides[1])]}, the baseline's {words[bool(sides[0])]}; gates still hold it"


def _why_missing(key: str, record: Mapping[str, Any]) -> str:
    """The reason that the record gives for a figure it lacks."""
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
            if not math.isfinite(figure.value)
        ]
    )
    return baseline
