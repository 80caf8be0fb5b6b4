"""What is measured of published methods: one sheet each, and the page that shows them all.

    python -m enginewright.reports.benchmarks.methods [NAME…] [--row ROW]

A method is declared by ``reports/methods/NAME.toml``: its models or passes in the catalogue, their tests, what is
exported at a published size, recipes that gain something, and what its paper claims. Everything else is measured here,
by the command line as a user has it; what takes too long for that is read from ``reports/results``, and the line names
the command that recorded it. Sheets hold times, so that nothing else may run beside this.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from enginewright import catalog, environment
from enginewright.ground.distance import relative_l2
from enginewright.ground.errors import ToolchainError, unknown
from enginewright.ground.reading import read_json
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.opened import open_subject
from enginewright.recipe import read as read_recipe
from enginewright.reports import record, sheets, words
from enginewright.reports.benchmarks import counts as counting
from enginewright.reports.benchmarks import page, scores
from enginewright.reports.benchmarks.large_models import watched, write_sparse
from enginewright.reports.sheets import Line, Row, Sheet, Verdict
from enginewright.show import model_details
from enginewright.sources.filling import without_memory
from enginewright.sources.reference import sizes_of
from enginewright.validation import latency
from enginewright.validation.inputs import draw
from enginewright.validation.latency import LatencySummary

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "reports" / "results"
QUIET_LOAD = 1.0
"""Load of a machine above which a time means nothing."""
ROUNDS = 30
"""Timed calls of each engine."""
ROUNDING = 1e-4
"""Relative error up to which a graph in fp32 is what PyTorch computes."""
EAGER = "pytorch"
"""The target that runs the changed module as it is."""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
THIS = "python -m enginewright.reports.benchmarks.methods"


class Declared(BaseModel):
    """A part of ``NAME.toml``; unknown keys are faults."""

    model_config = ConfigDict(extra="forbid")


class Faster(Declared):
    """Two models whose engines for ONNX Runtime are timed in turns.

    Args:
        model: the one that should be faster.
        than: the other.
        at_least: how many times as fast the paper says it is.
        sizes: of both models' dynamic dimensions.
    """

    model: str
    than: str
    at_least: float
    sizes: dict[str, int]


class Bounded(Declared):
    """A number, and what it is held against: one bound, or two."""

    at_least: float | None = None
    at_most: float | None = None

    def verdict(self, value: float) -> Verdict:
        """Whether it holds."""
        low = self.at_least is None or value >= self.at_least
        return "met" if low and (self.at_most is None or value <= self.at_most) else "missed"


class Score(Bounded):
    """A number that a function of ``scores.py`` measures on weights that ship, or one of ``counts.py`` by counting.

    Args:
        function: its name.
        of: what it is called with, such as a size.
        timed: whether it is of times, so that nothing else may run beside it.
    """

    function: str
    of: str
    timed: bool = False

    def found(self) -> float:
        """The number."""
        return float(function_of(self.function)(self.of))


def function_of(name: str) -> Callable[[str], float]:
    """The function that measures a score or counts.

    Raises:
        ToolchainError: there is none of that name.
    """
    for module in (scores, counting):
        if name in vars(module):
            found: Callable[[str], float] = vars(module)[name]
            return found
    raise unknown("function", name, [*vars(scores), *vars(counting)])


class Recorded(Bounded):
    """A number that a benchmark recorded, which takes too long to run for a sheet.

    Args:
        file: in ``reports/results``.
        value: keys that lead to it, and numbers of entries of lists.
        command: what records it again.
    """

    file: str
    value: tuple[str | int, ...]
    command: str

    def found(self) -> float:
        """The number.

        Raises:
            ToolchainError: there is none.
        """
        content = read_json(RESULTS / self.file, what=self.file)
        for key in self.value:
            try:
                content = content[key]
            except (KeyError, IndexError, TypeError) as cause:
                where = " > ".join(map(str, self.value))
                raise ToolchainError(f"{self.file} has no {key!r}", where=where, help=self.command) from cause
        if isinstance(content, bool) or not isinstance(content, int | float):
            raise ToolchainError(f"{self.file} holds no number there", where=" > ".join(map(str, self.value)))
        return float(content)


class Claim(Declared):
    """What the paper says of itself, or a count that is no size's.

    Args:
        what: the claim.
        source: where it stands.
        faster: how it is measured, where it is of times on a CPU.
        score: how it is measured, where a function can.
        recorded: where it was measured, where that takes long.
        why_not: why it is not measured here; or what must be known beside what was.
    """

    what: str
    source: str
    faster: Faster | None = None
    score: Score | None = None
    recorded: Recorded | None = None
    why_not: str = ""


class Method(Declared):
    """``NAME.toml``.

    Args:
        title: what it is, in a few words.
        paper: where it was published.
        models: entries of the catalogue.
        passes: entries of the catalogue, of a method that changes a model of others.
        tests: files that prove that they are faithful.
        unchecked: why nothing of the authors' could be checked beside it; empty where it was.
        tiny: model strings whose engines are compared, and recipes, where a pass is what is tried. A recipe with the
            target ``pytorch`` has its engines compared with the changed module too: a pass may approximate, no engine.
        published: a model string that is exported at a published size, with weights of zeros; empty: none.
        recipes: names of recipes that gain something.
        no_recipe: why there is none.
        claims: of the paper.
        counts: what explains counts that are not the published ones.
        counted: counts that are not those of a published size.
        untrained: why nothing that ships was trained; empty where something was.
    """

    title: str
    paper: str
    models: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    tests: tuple[str, ...]
    unchecked: str = ""
    tiny: tuple[str, ...]
    published: str = ""
    recipes: tuple[str, ...] = ()
    no_recipe: str = ""
    claims: tuple[Claim, ...]
    counts: str = ""
    counted: tuple[Claim, ...] = ()
    untrained: str = ""


def declared() -> dict[str, Method]:
    """Every method that has a declaration, by name."""
    return {p.stem: Method.model_validate(tomllib.loads(p.read_text())) for p in sorted(sheets.FOLDER.glob("*.toml"))}


def amount(text: str | float) -> tuple[float, float]:
    """A published amount such as "33.1 M", and half of its last printed digit."""
    found = re.fullmatch(r"([\d.]+)(?: ?([KMBG]))?", str(text))
    if not found:
        raise ToolchainError(f"{text!r} is no amount such as '33.1 M'")
    number, unit = found[1], UNITS.get(found[2] or "", 1.0)
    return float(number) * unit, 0.5 * 10 ** -len(number.partition(".")[2]) * unit


def counts(method: Method, name: str) -> Iterator[Line]:
    """Parameters and multiply-accumulates of published sizes beside the published figures."""
    for model in method.models:
        for size in catalog.load("models", model).PUBLISHED:
            found, what = model_details(model, size), f"{model}:{size}"
            figures = [each for each in found["published"] if each["figure"] in ("parameter_count", "macs")]
            if not figures:
                yield counted(name, what, "no figure was found", f"{found['parameter_count']:,}", None, "")
            for figure in figures:
                value = found[figure["figure"]]
                wanted, rounding = amount(figure["value"])
                asked = f"{figure['figure']} {figure['value']} ({figure['source']})"
                fits = abs(value - wanted) <= rounding
                yield counted(name, what, asked, f"{value:,}", fits, "" if fits else method.counts)
    for claim in method.counted:
        yield held(claim, "counts", name)


def counted(name: str, what: str, asked: str, measured: str, fits: bool | None, why: str) -> Line:
    """One count; without a published figure it is one that nobody can miss."""
    verdict: Verdict = "not_measurable" if fits is None else "met" if fits else "missed"
    command = f"{THIS} {name}"
    return Line(row="counts", what=what, asked=asked, measured=measured, verdict=verdict, why=why, command=command)


def faithful(method: Method, name: str) -> Iterator[Line]:
    """What the docstrings say was checked beside the authors' code; and the tests that hold it."""
    for model in (*method.models, *method.passes):
        kind = "models" if model in method.models else "passes"
        text = " ".join(catalog.entry(kind, model).docstring.split())
        found = [] if method.unchecked else re.findall(r"Checked (?:against|beside) .*?\.(?= |$)", text)
        yield Line(
            row="faithful",
            what=model,
            asked="checked beside the authors' code",
            measured=" ".join(found),
            verdict="met" if found else "not_measurable" if method.unchecked else "missed",
            why="" if found else method.unchecked,
            command=f"enginewright show {model}",
        )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *method.tests]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = next((line for line in reversed(run.stdout.splitlines()) if "passed" in line or "failed" in line), "no test")
    yield Line(
        row="faithful",
        what="mechanisms, counts and recorded outputs",
        asked="every test passes",
        measured=re.sub(r" in [\d.]+s.*", "", last.strip("= ")),
        verdict="met" if run.returncode == 0 else "missed",
        command=f"python -m pytest {' '.join(method.tests)}",
    )


def enginewright(*arguments: str) -> list[str]:
    """A command line of ours."""
    return [sys.executable, "-m", "enginewright", *arguments, "--quiet"]


def exported(method: Method, name: str) -> Iterator[Line]:
    """Engines of the tiny sizes beside PyTorch, over all declared sizes; and a published size as a graph."""
    for model in method.tiny:
        with tempfile.TemporaryDirectory() as folder:
            targets = ("--target", "onnxruntime", "--target", "tensorrt_rtx")
            arguments = ("run", model) if model in catalog.entries("recipes") else ("export", model, *targets)
            subprocess.run(enginewright(*arguments, "-o", f"{folder}/out"), cwd=ROOT, capture_output=True, check=False)
            report = record.read(Path(folder) / "out" / "report.json")
            beside = beside_changed(Path(folder) / "out", report.targets)
        command = f"enginewright {' '.join(arguments)} -o OUT"
        for target in report.targets:
            if target.name != EAGER:
                yield engine(model, target, command, beside.get(target.name, ()))
    if method.published:
        yield of_published_size(method.published)


def beside_changed(out: Path, targets: Sequence[record.TargetRecord]) -> Mapping[str, Sequence[float]]:
    """How far the engines of a recipe that built ``pytorch`` are from the changed module, by name, at all sizes."""
    if not any(target.name == EAGER and target.built for target in targets):
        return {}
    opened = open_subject(str(out))
    assert opened.model is not None
    found: dict[str, list[float]] = {}
    for target in targets:
        if target.name == EAGER or not target.fidelity:
            continue
        for number, size in enumerate([{}, *(size.sizes for size in target.sizes if size.verdict == "met")]):
            call = opened.model.at(size, number)
            wanted, got = opened.runners[EAGER](call), opened.runners[target.name](call)
            found.setdefault(target.name, []).append(max(relative_l2(wanted[each], got[each]) for each in wanted))
    return found


def engine(model: str, target: record.TargetRecord, command: str, beside: Sequence[float]) -> Line:
    """One engine of a tiny size.

    Args:
        model: what it was built from.
        target: what was measured of it.
        command: that builds it.
        beside: errors beside the changed module, at all sizes; empty: those to what was intended count.
    """
    what = f"{model}, {target.name}"
    if not target.fidelity:
        return Line(
            row="exported",
            what=what,
            asked="an engine is built",
            measured=f"built, {words.size(target.bytes)}" if target.built else "",
            verdict="met" if target.built else "missed",
            why=target.reason,
            command=command,
        )
    errors = [output.relative_l2 for output in target.fidelity]
    errors += [size.relative_l2 for size in target.sizes if size.relative_l2 is not None]
    tried = len({json.dumps(size.sizes) for size in target.sizes if size.verdict == "met"})
    fits = max(beside or errors) <= ROUNDING and not target.faults
    to = ", to the changed module in PyTorch" if beside else ""
    meant = f"; {max(errors):.2g} to what is meant" if beside else ""
    return Line(
        row="exported",
        what=what,
        asked=f"relative error at most {ROUNDING:g} at every size{to}",
        measured=f"{max(beside or errors):.2g} at the typical and {words.plural(tried, 'other size')}{meant}",
        verdict="met" if fits else "missed",
        why="; ".join(target.faults),
        command=command,
    )


def of_published_size(model: str) -> Line:
    """A published size from weights that lie on disk and are never read."""
    entry, _, size = model.partition(":")
    module = catalog.load("models", entry)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        with without_memory():
            state = module.build(sizes_of(module)[size]).state_dict()
        written = write_sparse(state, torch.float32, weights)
        began = time.perf_counter()
        arguments = ("export", model, "--weights", str(weights), "--no-validate", "-o", f"{folder}/out")
        run, own = watched(enginewright(*arguments))
        seconds = time.perf_counter() - began
    return Line(
        row="exported",
        what=f"{model} as a graph",
        asked="its weights stay where they lie",
        measured=f"{seconds:.0f} s; {words.size(own)} of memory for {words.size(written)} of weights",
        verdict="met" if run.returncode == 0 else "missed",
        command=f"enginewright export {model} --weights FILE --no-validate -o OUT",
    )


def gained(method: Method, name: str) -> Iterator[Line]:
    """What recipes save, beside the untouched original."""
    if not method.recipes:
        yield absent("gained", "a recipe", method.no_recipe)
    for recipe in method.recipes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("run", recipe, "-o", f"{folder}/out")
            run = subprocess.run(enginewright(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
            path = Path(folder) / "out" / "report.json"
            report = record.read(path) if path.exists() else None
        command = f"enginewright run {recipe} -o OUT"
        if report is None:
            why = next((line for line in run.stderr.splitlines() if line.startswith("error")), "no report was written")
            yield Line(row="gained", what=recipe, asked="it runs", verdict="missed", why=why, command=command)
            continue
        for target in report.targets:
            if target.latency:
                yield gain(recipe, report, target, command)


def gain(recipe: str, report: record.Report, target: record.TargetRecord, command: str) -> Line:
    """One engine of a recipe beside the untouched original."""
    timed = target.latency
    assert timed is not None
    error = max(output.relative_l2 for output in target.fidelity)
    parts = [
        f"{timed.ratio:.3f} ({timed.ratio_low:.3f} to {timed.ratio_high:.3f}) of the original's time",
        f"relative error {error:.2g}",
        f"{words.size(target.bytes)} of {words.size(report.model.bytes)}",
    ]
    if report.steps and report.steps[-1].macs.after is not None and report.steps[0].macs.before:
        parts.append(f"{report.steps[-1].macs.after / report.steps[0].macs.before:.3f} of the multiply-accumulates")
    parts += [f"{each.name} {each.value:.3g}" for each in target.quality if each.value is not None]
    return Line(
        row="gained",
        what=f"{recipe}, {target.name}",
        asked="faster than the untouched original, beyond doubt",
        measured="; ".join(parts),
        verdict="met" if timed.ratio_high < 1 and not timed.unsafe else "missed",
        why="; ".join(timed.unsafe),
        command=command,
    )


def claims(method: Method, name: str) -> Iterator[Line]:
    """What the paper says of itself."""
    for claim in method.claims:
        yield held(claim, "claim", name)


def held(claim: Claim, row: Row, name: str) -> Line:
    """A claim, or a count, beside what is measured or was recorded."""
    verdict: Verdict = "not_measurable"
    measured, command = "", f"{THIS} {name}"
    if claim.faster is not None:
        found = times_as_fast(claim.faster)
        verdict = "met" if found.ratio_low >= claim.faster.at_least and not found.unsafe else "missed"
        measured = f"{found.ratio:.2f} times as fast ({found.ratio_low:.2f} to {found.ratio_high:.2f})"
    if claim.score is not None:
        value = claim.score.found()
        verdict, measured = claim.score.verdict(value), number_said(value)
    if claim.recorded is not None:
        value = claim.recorded.found()
        verdict, measured, command = claim.recorded.verdict(value), number_said(value), claim.recorded.command
    return Line(
        row=row,
        what=claim.what,
        asked=claim.source,
        measured=measured,
        verdict=verdict,
        why=claim.why_not,
        command=command,
    )


def number_said(value: float) -> str:
    """A number for a reader: a count with all its digits, a share with four."""
    return f"{int(value):,}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"


def times_as_fast(claim: Faster) -> LatencySummary:
    """How many times the time of the one model the other takes, with its interval; weights are random."""
    with tempfile.TemporaryDirectory() as folder:
        runners: dict[str, Runner] = {}
        for model in (claim.model, claim.than):
            out = f"{folder}/{len(runners)}"
            arguments = ("export", model, "--no-validate", "--target", "onnxruntime", "-o", out)
            subprocess.run(enginewright(*arguments), cwd=ROOT, check=True)
            opened = open_subject(out)
            runners[model] = partial(
                called, opened.runners["onnxruntime"], draw(opened.inputs, seed=0, sizes=claim.sizes)
            )
        taken = latency.time_in_turns(runners, {}, warm_up=2, samples=ROUNDS, seed=0)
    return latency.summarise(taken[claim.model], taken[claim.than], seed=0)


def called(runner: Runner, inputs: Arrays, ignored: Arrays) -> Arrays:
    """What a runner makes of inputs of its own."""
    return runner(inputs)


def changed_by(name: str) -> str:
    """The model string of a recipe that ships."""
    return read_recipe(catalog.recipe_path(name)).head.model


def ships(model: str) -> bool:
    """Whether a model string names weights that ship."""
    entry, _, size = model.partition(":")
    return entry in catalog.entries("models") and size in catalog.load("models", entry).SHIPPED


def trained(method: Method, name: str) -> Iterator[Line]:
    """Which weights ship: a method's own, or those that its recipes change, where it is a change of others' models."""
    shipped = [f"{model}:{size}" for model in method.models for size in catalog.load("models", model).SHIPPED]
    if not method.models:
        shipped = sorted({changed for name in method.recipes if ships(changed := changed_by(name))})
    if not shipped:
        yield absent("trained", "weights that ship", method.untrained)
    for model in shipped:
        yield Line(
            row="trained", what=model, asked="trained, and ships", verdict="met", command=f"enginewright show {model}"
        )


def absent(row: Row, what: str, why: str) -> Line:
    """A line for what is not there yet."""
    return Line(
        row=row, what=what, asked="there is one", verdict="missed", why=why, command="enginewright list methods"
    )


MEASURES = {
    "counts": counts,
    "faithful": faithful,
    "exported": exported,
    "gained": gained,
    "claim": claims,
    "trained": trained,
}


def measure(name: str, method: Method, rows: Collection[str]) -> Sheet:
    """These rows of one method's sheet; the others stay what they were."""
    path = sheets.FOLDER / f"{name}.json"
    before = sheets.read(path).lines if path.exists() else ()
    lines: list[Line] = []
    for row, lines_of in MEASURES.items():
        if row not in rows:
            lines += [line for line in before if line.row == row]
            continue
        began = time.perf_counter()
        lines += list(lines_of(method, name))
        print(f"{name}: {row} {time.perf_counter() - began:.0f} s", flush=True)
    return Sheet(
        name=name,
        title=method.title,
        paper=method.paper,
        models=method.models,
        lines=tuple(lines),
        environment={key: value for key, value in environment.describe().items() if key != "load"},
        recorded=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def takes_times(method: Method, rows: Collection[str]) -> bool:
    """Whether times are among what is measured."""
    return ("gained" in rows and bool(method.recipes)) or (
        "claim" in rows and any(claim.faster or (claim.score and claim.score.timed) for claim in method.claims)
    )


def main() -> None:
    """Measure the methods that were named, or all."""
    known = declared()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--row", action="append", choices=MEASURES, help="what to measure again; default: all")
    arguments = parser.parse_args()
    names, rows = arguments.names or list(known), arguments.row or list(MEASURES)
    if odd := [name for name in names if name not in known]:
        sys.exit(str(unknown("method", odd[0], known)))
    if any(takes_times(known[name], rows) for name in names) and os.getloadavg()[0] > QUIET_LOAD:
        sys.exit(
            f"the load is {os.getloadavg()[0]:.1f}: times would be of other programs too; wait until it is below 1"
        )
    for name in names:
        page.write(measure(name, known[name], rows))


if __name__ == "__main__":
    main()
