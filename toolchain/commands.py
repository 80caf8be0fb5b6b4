"""What each command does; answers go to standard output, progress and errors to standard error."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from toolchain import catalog
from toolchain.arguments import recipe_from, sizes_from
from toolchain.errors import CANNOT, DONE, MISSED, ToolchainError
from toolchain.progress import Progress


def answer(chosen: Namespace, data: Any, text: Callable[[], Any]) -> None:
    """Print ``data`` as JSON when asked to, or else say it."""
    if chosen.json:
        print(json.dumps(data, indent=2))
    else:
        text()


def table(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> None:
    """Print aligned columns; the last one may be long."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads) - 1)]
    for row in (heads, *rows):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())


def list_command(chosen: Namespace) -> int:
    """Names and summaries of one kind."""
    found = [{"name": entry.name, "summary": entry.summary} for entry in catalog.entries(chosen.kind).values()]
    answer(chosen, found, lambda: table([(e["name"], e["summary"]) for e in found], ("NAME", "SUMMARY")))
    return DONE


def show_command(chosen: Namespace) -> int:
    """One entry, looked up in every kind, or a source's model."""
    from toolchain.show import describe, tell

    data = describe(chosen.name, trust_remote_code=chosen.trust_remote_code)
    answer(chosen, data, lambda: tell(data))
    return DONE


def export_command(chosen: Namespace) -> int:
    """The main job, from arguments."""
    return export(recipe_from(chosen), chosen)


def run_command(chosen: Namespace) -> int:
    """The main job, from a file."""
    path = Path(chosen.recipe)
    if not path.is_file() and "/" not in chosen.recipe and path.suffix != ".toml":
        path = catalog.recipe_path(chosen.recipe)
    return export(read_saying(path, quiet=chosen.quiet), chosen)


def read_saying(path: Path, *, quiet: bool) -> Any:
    """Read a recipe and say which code it will run; always where it lies in an artifact, which others may have made."""
    from toolchain import artifact
    from toolchain.recipe import read
    from toolchain.trust import recipe_code

    artifact.heal_absent(path.parent)
    recipe = read(path)
    inside = (path.parent / artifact.MANIFEST).is_file()
    if found := recipe_code(recipe):
        whose = "the recipe of this artifact" if inside else "this recipe"
        Progress(quiet=quiet and not inside).line(f"{whose} runs code: {', '.join(found)}")
    return recipe


def export(recipe: Any, chosen: Namespace) -> int:
    """Run a recipe and say how it went; a pipeline gives one artifact for each of its networks."""
    from toolchain import artifact, sources

    parts = sources.parts_of(recipe.model)
    if not parts:
        artifact.refuse_existing(chosen.output, force=chosen.force)
        data, code, text = export_one(recipe, chosen.output, chosen)
        answer(chosen, data, text)
        return code
    for part in parts:
        artifact.refuse_existing(chosen.output / part, force=chosen.force)
    done = [export_one(recipe.part(part), chosen.output / part, chosen) for part in parts]
    answer(
        chosen,
        {part: data for part, (data, _, _) in zip(parts, done, strict=True)},
        lambda: [text() for _, _, text in done],
    )
    codes = [code for _, code, _ in done]
    return MISSED if MISSED in codes else max(codes)


def export_one(recipe: Any, out: Path, chosen: Namespace) -> tuple[dict[str, Any], int, Callable[[], None]]:
    """One artifact: its report, the exit code, and a way to say it."""
    from reports import markdown
    from toolchain import pipeline

    progress = Progress(quiet=chosen.quiet)
    report, code = pipeline.export(recipe, out, force=chosen.force, progress=progress, trust_code=chosen.trust_code)

    def text() -> None:
        print(markdown.render(report))
        print(f"wrote {out}: open {out / 'report.html'}")

    return {**json.loads((out / "report.json").read_text()), "exit_code": code}, code, text


def plan_command(chosen: Namespace) -> int:
    """Decide every step and estimate; nothing is written."""
    from toolchain import pipeline

    is_file = chosen.subject.endswith(".toml")
    recipe = read_saying(Path(chosen.subject), quiet=chosen.quiet) if is_file else recipe_from(chosen, chosen.subject)
    decisions = pipeline.decide(recipe, Progress(quiet=chosen.quiet), trust_code=chosen.trust_code)
    data = [{**d.step.model_dump(mode="json"), "plan": json.loads(d.plan.as_json())} for d in decisions]

    def text() -> None:
        for d in decisions:
            step = d.step
            print(f"{step.name}: would change {len(step.changed)} layers, leave {len(step.skipped)}")
            for label in ("parameter_count", "macs", "bytes"):
                count = getattr(step, label)
                if count.before is not None and count.after is not None:
                    print(f"  {label}: {count.before:,} -> {count.after:,}")
            for skip in step.skipped:
                print(f"  leaves {skip.path}: {skip.reason}")
        if not decisions:
            print("no steps: the model would be exported as it is")

    answer(chosen, data, text)
    return DONE


def bench_command(chosen: Namespace) -> int:
    """Paired latency of everything that was named, beside the first one's original."""
    from toolchain.measure import time_all
    from toolchain.opened import open_subject
    from toolchain.recipe import Validation, threads_here
    from validation.inputs import draw

    subjects = [chosen.subject, *chosen.against]
    if len(subjects) == 1 and not Path(chosen.subject.partition("#")[0]).is_dir():
        raise ToolchainError("there is nothing to time it against", help="name an artifact, or add --against SUBJECT")
    progress = Progress(quiet=chosen.quiet)
    threads = chosen.threads or threads_here()
    with progress.stage("load"):
        opened = [
            open_subject(text, threads=threads, source=chosen.source, trust_code=chosen.trust_code) for text in subjects
        ]
    first = opened[0]
    runners = {
        (name if len(opened) == 1 else f"{text} {name}"): runner
        for text, one in zip(subjects, opened, strict=True)
        for name, runner in one.runners.items()
        if runner is not first.original
    }
    original = first.original or runners.pop(next(iter(runners)))
    call = draw(first.inputs, seed=0, sizes=sizes_from(chosen.size, first.inputs))
    settings = Validation(rounds=chosen.rounds)
    with progress.stage("time, in turns"):
        timed = time_all(original, runners, call, settings, 0, threads, progress)

    def text() -> None:
        rows = [
            (
                name,
                f"{t.median_s * 1e3:.2f}",
                f"{t.p90_s * 1e3:.2f}",
                f"{t.ratio:.3f} [{t.ratio_low:.3f}, {t.ratio_high:.3f}]",
            )
            for name, t in timed.items()
        ]
        base = next(iter(timed.values())).original_median_s
        print(f"original: median {base * 1e3:.2f} ms, {threads} threads, {chosen.rounds} rounds")
        table(rows, ("ENGINE", "MEDIAN MS", "P90 MS", "RATIO [95 %]"))
        for name, t in timed.items():
            for warning in t.warnings:
                print(f"{name}: {warning}")
        for one in opened:
            for name, reason in one.absent.items():
                print(f"{name}: not measured ({reason})")

    absent = {name: reason for one in opened for name, reason in one.absent.items()}
    data = {"runners": {name: t.model_dump(mode="json") for name, t in timed.items()}, "not_measured": absent}
    answer(chosen, data, text)
    return DONE


def compare_command(chosen: Namespace) -> int:
    """Fidelity of the second subject's runners to the first's."""
    from reports.record import TargetRecord
    from toolchain.measure import as_record, judge_gates
    from toolchain.opened import open_subject
    from toolchain.recipe import gate_names
    from validation.fidelity import compare, non_finite
    from validation.gates import parse
    from validation.inputs import draw

    bounds = [parse(text, known=gate_names(), where="--gate") for text in chosen.gate]
    progress = Progress(quiet=chosen.quiet)
    with progress.stage("load"):
        first, second = (
            open_subject(text, source=chosen.source, trust_code=chosen.trust_code)
            for text in (chosen.original, chosen.candidate)
        )
    name, original = next(iter(first.runners.items()))
    model = first.model or second.model
    specs = model.inputs if model else first.inputs
    calls = model.batches(chosen.calls, 0) if model else [draw(specs, seed=i) for i in range(chosen.calls)]
    wanted = [original(call) for call in calls]
    records = []
    for other, runner in second.runners.items():
        got = [runner(call) for call in calls]
        faults = non_finite(got) or non_finite(wanted)
        found = [] if faults else [as_record(output) for output in compare(wanted, positional(wanted, got))]
        records.append(
            TargetRecord(
                name=other,
                parameters={},
                installed=True,
                importable=True,
                buildable=True,
                runnable=True,
                built=True,
                fidelity=found,
                faults=faults,
            )
        )
    gates = judge_gates(bounds, records)

    def text() -> None:
        rows = [
            (r.name, f.output, f"{f.max_abs:.3g}", f"{f.relative_l2:.3g}", f"{f.cosine:.9f}")
            for r in records
            for f in r.fidelity
        ]
        print(f"beside {name}, {chosen.calls} calls:")
        table(rows, ("RUNNER", "OUTPUT", "MAX ABS", "RELATIVE L2", "COSINE"))
        for r in records:
            for fault in r.faults:
                print(f"{r.name}: {fault}")
        for gate in gates:
            print(f"{gate.target}: {gate.name} {gate.bound}: {gate.verdict.replace('_', ' ')} {gate.reason}".rstrip())

    data = {
        "original": name,
        "runners": [
            {"name": r.name, "faults": r.faults, "fidelity": [f.model_dump() for f in r.fidelity]} for r in records
        ],
        "gates": [gate.model_dump() for gate in gates],
    }
    answer(chosen, data, text)
    return MISSED if any(r.faults for r in records) else gate_code(gate.verdict for gate in gates)


def positional(wanted: list[Any], got: list[Any]) -> list[Any]:
    """Outputs under the original's names, where both have as many: engines of other makers name theirs otherwise."""
    if wanted and got and len(wanted[0]) == len(got[0]):
        return [dict(zip(w, g.values(), strict=True)) for w, g in zip(wanted, got, strict=True)]
    return got


def gate_code(verdicts: Iterable[str]) -> int:
    """Exit code of some gates."""
    found = set(verdicts)
    return MISSED if "missed" in found else CANNOT if "not_measured" in found else DONE


def check_command(chosen: Namespace) -> int:
    """Hold an artifact's figures against a baseline."""
    from reports import junit, record
    from toolchain import artifact
    from toolchain.writing import in_words, make_folder, write_where_told
    from validation import regression

    artifact.read_manifest(chosen.artifact)
    report = record.read(chosen.artifact / "report.json")
    content = json.loads((chosen.artifact / "report.json").read_text())
    if chosen.update:
        keep = regression.read(chosen.baseline) if chosen.baseline.exists() else None
        baseline = regression.baseline_from(content, keep=keep)
        with in_words("the baseline", chosen.baseline):
            make_folder(chosen.baseline.parent)
        regression.write(chosen.baseline, baseline)
        written = {"wrote": str(chosen.baseline), "figures": len(baseline.figures)}
        answer(chosen, written, lambda: print(f"wrote {chosen.baseline}: {len(baseline.figures)} figures"))
        return DONE
    comparisons = regression.check(regression.read(chosen.baseline), content)
    failed = [c for c in comparisons if c.failed]
    if chosen.junit:
        cases = [(c.key, c.reason or f"was {c.baseline}, is {c.current}" if c.failed else "") for c in comparisons]
        write_where_told(chosen.junit, junit.render_cases(report.model.name, cases), what="the JUnit file")

    def text() -> None:
        print(regression.render_table(comparisons))
        print(f"{len(failed)} of {len(comparisons)} figures regressed" if failed else "nothing regressed")

    answer(
        chosen,
        {"regressed": len(failed), "figures": [vars(c) | {"tolerance": str(c.tolerance)} for c in comparisons]},
        text,
    )
    return MISSED if failed else DONE


def report_command(chosen: Namespace) -> int:
    """Render again."""
    from reports import record, rendering
    from toolchain import artifact

    artifact.heal_absent(chosen.artifact)
    report = record.read(chosen.artifact / "report.json")
    rendering.write_all(report, chosen.artifact)
    names = ["report.html", "report.md", "junit.xml"]
    answer(chosen, {"wrote": names}, lambda: print(f"wrote {', '.join(names)} in {chosen.artifact}"))
    return DONE


def doctor_command(chosen: Namespace) -> int:
    """The four answers of every target, and the machine."""
    from toolchain import environment

    targets = []
    for name in catalog.entries("targets"):
        able = catalog.target_class(name)().availability()
        answers = {key: getattr(able, key) for key in ("installed", "importable", "buildable", "runnable")}
        reason = next((given.reason for given in answers.values() if not given.yes), "")
        targets.append({"name": name, **{key: given.yes for key, given in answers.items()}, "reason": reason})
    data = {"targets": targets, "environment": environment.describe(), "versions": environment.versions()}

    def text() -> None:
        keys = ("installed", "importable", "buildable", "runnable")
        rows = [(str(t["name"]), *("yes" if t[key] else "no" for key in keys), str(t["reason"])) for t in targets]
        table(rows, ("TARGET", *(key.upper() for key in keys), "WHY NOT"))
        print()
        for section in (environment.describe(), environment.versions()):
            table([(key, str(value)) for key, value in section.items()], ("", ""))

    answer(chosen, data, text)
    return DONE
