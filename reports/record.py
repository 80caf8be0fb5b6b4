"""The record of a run, ``report.json``: a versioned schema, checked on writing and on reading.

What was not measured is absent or null with its reason, never zero.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from enginewright.ground.errors import ToolchainError, invalid, raise_faults
from enginewright.ground.reading import read_json
from enginewright.ground.writing import write_text

SCHEMA: Literal[1] = 1
Verdict = Literal["met", "missed", "not_measured", "inconclusive"]


def spelled(value: float) -> float | str:
    """A number as JSON can hold it: an infinity as a word, which reads back as one. A NaN stays, and is refused."""
    return value if not math.isinf(value) else "Infinity" if value > 0 else "-Infinity"


Figure = Annotated[float, PlainSerializer(spelled, return_type=float | str, when_used="json")]
"""A number that may be infinite by its definition."""


Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
"""A time of one call."""


class Part(BaseModel):
    """A piece of the record; unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")


class BeforeAfter(Part):
    """A count around a step; null where it was not measured."""

    before: int | None
    after: int | None


class Skip(Part):
    """A layer that a step left alone."""

    path: str
    reason: str


class Curve(Part):
    """A trade that a step chose from: what could be had, and what was taken; (x, y) pairs."""

    x: str
    y: str
    points: list[tuple[float, float]]
    chosen: tuple[float, float]


class TokenMap(Part):
    """Which tokens of one input stayed: for each, how many of the borders it passed, and the input's picture."""

    left: list[list[int]]
    borders: int
    picture: list[list[tuple[int, int, int]]] = []


class Step(Part):
    """What one step of the recipe did."""

    name: str
    part: str = ""
    """Of a pipeline, the part that it changed."""
    parameters: dict[str, Any]
    plan_digest: str
    changed: list[str]
    skipped: list[Skip]
    parameter_count: BeforeAfter
    macs: BeforeAfter
    bytes: BeforeAfter
    seconds: float
    notes: list[str] = []
    curve: Curve | None = None
    maps: list[TokenMap] = []

    @property
    def label(self) -> str:
        """Its name, after that of the part where there are several."""
        return f"{self.part}: {self.name}" if self.part else self.name


class Fidelity(Part):
    """One output of an engine against the original's, the worst over the validation inputs.

    ``snr_db`` is null when the outputs are equal to the last bit (the ratio is then infinite). ``relative_l2`` is
    infinite when only the original is exactly 0.
    """

    output: str
    max_abs: Figure
    mean_abs: Figure
    relative_l2: Figure
    cosine: Figure
    snr_db: Figure | None
    worst_column: Figure | None = None
    more: dict[str, Figure | None] = {}
    """Metrics that have no field of their own, by name."""
    calls: int | None = None
    """Over how many calls; those without an element to compare are not counted. Null in older reports."""
    worst_call: int | None = None
    """The one with the largest relative L2 error, counted from 1."""
    median: dict[str, Figure | None] = {}
    """The same figures in the middle of the calls."""
    mask: str = ""
    """The input that says which rows are real; every figure above is over those alone."""
    everywhere: dict[str, Figure | None] = {}
    """The worst over all rows, those that ``mask`` leaves out among them; empty without one."""

    def value(self, metric: str) -> float | None:
        """The figure of a metric, whether it has a field of its own or not."""
        return self.more.get(metric) if metric not in type(self).model_fields else getattr(self, metric)


FIGURES = ("max_abs", "mean_abs", "relative_l2", "cosine", "snr_db", "worst_column")
"""Metrics with a field of their own in ``Fidelity``."""


class Quality(Part):
    """One figure of whole sampling runs; null with a reason when it could not be measured."""

    name: str
    value: float | None
    original: float | None = None
    unit: str = ""
    higher_is_better: bool
    reason: str = ""


class Latency(Part):
    """Paired timing: every sample of the engine and of the original beside it, in seconds.

    The ratio is engine / original, of medians; its limits are a 95 % bootstrap interval. Nothing may rest on a ratio
    that ``unsafe`` gives a reason against.
    """

    samples_s: list[Seconds]
    original_samples_s: list[Seconds]
    median_s: Seconds
    p90_s: Seconds
    p99_s: Seconds
    original_median_s: Seconds
    spread: float
    ratio: float
    ratio_low: float
    ratio_high: float
    warm_up: int
    threads: int
    shapes: dict[str, list[int]]
    warnings: list[str]
    unsafe: list[str] = []
    original_low_s: float | None = None
    original_high_s: float | None = None
    """A 95 % bootstrap interval of the original's median."""
    cpu_s: list[float] = []
    original_cpu_s: list[float] = []
    """Processor time of the whole process in each sample, all its threads together."""
    interrupted: list[int] = []
    original_interrupted: list[int] = []
    """How often the system took a core from this process in each sample; empty where it does not say."""
    device: str = "cpu"
    original_device: str = "cpu"
    """Where each ran; where that is not the same, ``unsafe`` says so."""
    copies_timed: bool = False
    """Whether times hold copies between the host and the device; else inputs lay on the device before."""


class SizeCheck(Part):
    """What an engine did at some sizes of its dynamic dimensions; missed where it failed or strayed."""

    sizes: dict[str, int]
    calls: int = 1
    relative_l2: float | None = None
    verdict: Verdict
    reason: str = ""


class TargetRecord(Part):
    """One target: the four answers, and what was built and measured.

    ``bytes`` is what must be copied to run the engine: every file that it reads, whole. The target ``pytorch`` runs the
    model itself, whose source is not counted.
    """

    name: str
    kind: str = ""
    """The target; another word than its name where a recipe names it. Older records leave it out."""
    part: str = ""
    """Of a pipeline, the part that it was built of, or ``whole``; its name is then ``PART.TARGET``."""
    parameters: dict[str, Any]
    installed: bool
    importable: bool
    buildable: bool
    runnable: bool
    built: bool
    optional: bool = False
    reason: str = ""
    bytes: int | None = None
    """Of every file that must be copied for the engine to run elsewhere: those of ``files``."""
    folders: list[str] = []
    """What is to be copied, inside the artifact."""
    files: dict[str, int] = {}
    """Those files with their sizes, by their paths in the artifact."""
    fp32_ratio: float | None = None
    """Time of the engine over that of the same graph in fp32 in the same runtime, where both were timed."""
    seconds: float | None = None
    notes: list[str] = []
    fidelity: list[Fidelity] = []
    fidelity_to_original: list[Fidelity] = []
    """To the untouched original, where steps meant to compute something else than that; else as ``fidelity``, empty."""
    fidelity_in_half: list[Fidelity] = []
    """Of PyTorch in true half precision, which the export was asked for: a CPU's engine computes it in fp32."""
    doubt: str = ""
    """Why no gate may rest on its fidelity; empty where one may."""
    quality: list[Quality] = []
    latency: Latency | None = None
    sizes: list[SizeCheck] = []
    """Sizes other than the typical ones that the engine was run at."""
    not_compared: list[str] = []
    """Outputs that were compared on nothing, though others were compared."""
    faults: list[str] = []
    """Things that make the engine unusable, such as an output that is not finite."""


class Gate(Part):
    """One bound asked of one target."""

    name: str
    target: str
    bound: str
    verdict: Verdict
    value: Figure | None = None
    reason: str = ""


class Samples(Part):
    """Pictures for the report, PNG as base64: the original's beside an engine's, from the same noise."""

    target: str
    original_png: str
    candidate_png: str
    caption: str


class LeftOut(Part):
    """An argument of the original that the engines have no input for."""

    name: str
    reason: str


class ModelRecord(Part):
    """The model as it came in."""

    name: str
    weights: str
    parameter_count: int
    macs: int | None
    bytes: int
    inputs_left_out: list[LeftOut] = []
    notes: list[str] = []
    """What its source chose or left out, and what it added, as sentences without full stops."""


class PartRecord(Part):
    """A part of a pipeline, which has an artifact of its own in the folder of its name."""

    name: str
    model: ModelRecord
    verdict: Verdict


class Report(Part):
    """A whole run."""

    schema_version: Literal[1] = SCHEMA
    model: ModelRecord
    """Of a pipeline: all its parts together."""
    parts: list[PartRecord] = []
    """Of a pipeline; empty for one network."""
    verdict: Verdict
    steps: list[Step]
    targets: list[TargetRecord]
    gates: list[Gate]
    samples: list[Samples] = []
    validation: dict[str, Any] = {}
    """How it was measured: inputs, seeds, sample counts; or ``{"skipped": reason}``."""
    environment: dict[str, Any]
    seconds: float
    versions: dict[str, str] = {}
    notes: list[str] = []
    """Sentences about the artifact as a whole."""

    def weights_of(self, target: TargetRecord) -> int:
        """Bytes of the weights that a target was built from."""
        own = (each.model.bytes for each in self.parts if each.name == target.part)
        return next(own, self.model.bytes)


def write(report: Report, path: Path) -> None:
    """Write ``report.json``; the schema number stands first, under ``schema``."""
    content = report.model_dump(mode="json")
    content = {"schema": content.pop("schema_version"), **content}
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read(path: Path) -> Report:
    """Read ``report.json``.

    Raises:
        ToolchainError: not JSON, another schema, or a key that is missing, unknown or of the wrong type.
    """
    content = read_json(path, what=path.name, absent=f"there is no report at {path.name!r}", finite=False)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ToolchainError(f"{path.name} has schema {found!r}; this version reads {SCHEMA}", where=str(path))
    content["schema_version"] = content.pop("schema")
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        raise_faults(invalid(error, what=path.name, where=str(path)))
        raise AssertionError("unreachable") from error
