"""What each command does; answers go to standard output, progress and errors to standard error."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from enginewright import catalog, sources
from enginewright.arguments import recipe_from, sizes_from
from enginewright.ground.errors import CANNOT, DONE, MISSED, ToolchainError
from enginewright.progress import Progress
from enginewright.screen import show, table


def answer(chosen: Namespace, data: Any, text: Callable[[], Any]) -> None:
    """Print ``data`` as one JSON document when asked to, or else say it.

    A reader that has gone (``| head``) changes nothing about how the command ends.
    """
    try:
        if chosen.json:
            print(json.dumps(data, indent=2), file=getattr(chosen, "answers", None) or sys.stdout)
        else:
            text()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again when it ends


def list_command(chosen: Namespace) -> int:
    """Names and summaries of one kind, or of every kind."""
    if chosen.kind:
        found = [{"name": name, "summary": summary} for name, summary in catalog.listing(chosen.kind)]
        answer(chosen, found, lambda: table([(e["name"], e["summary"]) for e in found], ("NAME", "SUMMARY")))
        return DONE
    rows = [(kind, *entry) for kind in catalog.KINDS for entry in catalog.listing(kind)]
    data = [dict(zip(("kind", "name", "summary"), row, strict=True)) for row in rows]
    answer(chosen, data, lambda: table(rows, ("KIND", "NAME", "SUMMARY")))
    return DONE


def show_command(chosen: Namespace) -> int:
    """One entry, looked up in every kind, or a source's model."""
    from enginewright.show import describe, tell

    data = describe(chosen.name, trust_remote_code=chosen.trust_remote_code)
    answer(chosen, data, lambda: tell(data))
    return DONE


def export_command(chosen: Namespace) -> int:
    """The main job, from arguments."""
    return export(recipe_from(chosen), chosen)


def run_command(chosen: Namespace) -> int:
    """The main job, from a file."""
    path = Path(chosen.recipe)
    if path.is_dir():
        held = path / "recipe.toml"
        help_ = f"write: enginewright run {held}" if held.is_file() else "to export a model, use: enginewright export"
        raise ToolchainError(f"{chosen.recipe!r} is a folder, and a recipe is a TOML file", help=help_)
    if chosen.recipe.partition(":")[0] in sources.prefixes():
        help_ = f"write: enginewright export {chosen.recipe}"
        raise ToolchainError(f"{chosen.recipe!r} is a model, and no recipe", help=help_)
    if not path.is_file() and "/" not in chosen.recipe and path.suffix != ".toml":
        path = catalog.recipe_path(chosen.recipe)
    return export(read_saying(path, quiet=chosen.quiet), chosen)


def read_saying(path: Path, *, quiet: bool) -> Any:
    """Read a recipe and say which code it will run; always where it lies in an artifact, which others may have made."""
    from enginewright import artifact
    from enginewright.recipe import read
    from enginewright.trust import recipe_code

    artifact.heal_absent(path.parent)
    recipe = read(path)
    inside = (path.parent / artifact.MANIFEST).is_file()
    if found := recipe_code(recipe):
        whose = "the recipe of this artifact" if inside else "this recipe"
        Progress(quiet=quiet and not inside).line(f"{whose} runs code: {', '.join(found)}")
    return recipe


def export(recipe: Any, chosen: Namespace) -> int:
    """Run a recipe and say how it went."""
    from enginewright import artifact, whole
    from enginewright.reports import markdown, terminal

    out = chosen.output
    artifact.refuse_existing(out, force=chosen.force)
    progress = Progress(quiet=chosen.quiet)
    report, code = whole.export(recipe, out, force=chosen.force, progress=progress, trust_code=chosen.trust_code)

    def text() -> None:
        if chosen.markdown:
            print(markdown.render(report), end="")
            return
        show(terminal.blocks(report))
        print(f"\nwrote {out}: open {out / 'report.html'}; {out / 'README.md'} tells how to run it elsewhere")

    answer(chosen, {**json.loads((out / "report.json").read_text()), "exit_code": code}, text)
    return code


def plan_command(chosen: Namespace) -> int:
    """Decide every step and estimate; nothing is written."""
    from enginewright import whole

    is_file = chosen.subject.endswith(".toml")
    recipe = read_saying(Path(chosen.subject), quiet=chosen.quiet) if is_file else recipe_from(chosen, chosen.subject)
    decisions = whole.decide(recipe, Progress(quiet=chosen.quiet), trust_code=chosen.trust_code)
    data = [{**d.step.model_dump(mode="json"), "plan": json.loads(d.plan.as_json())} for d in decisions]

    def text() -> None:
        for d in decisions:
            step = d.step
            print(f"{step.label}: would change {len(step.changed)} layers, leave {len(step.skipped)}")
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
    from enginewright import api
    from enginewright.reports import summary

    found = api.bench(
        chosen.subject,
        chosen.against,
        rounds=chosen.rounds,
        threads=chosen.threads,
        sizes=lambda first: sizes_from(chosen.size, first.inputs),
        source=chosen.source,
        trust_code=chosen.trust_code,
        quiet=chosen.quiet,
    )

    def text() -> None:
        rows = [
            (
                name,
                f"{t.median_s * 1e3:.2f}",
                f"{t.p90_s * 1e3:.2f}",
                f"{t.ratio:.3f} [{t.ratio_low:.3f}, {t.ratio_high:.3f}]{' inconclusive' if t.unsafe else ''}"
                + (f" ({where})" if (where := summary.devices(t)) else ""),
            )
            for name, t in found.runners.items()
        ]
        medians = {t.original_device: t.original_median_s for t in found.runners.values()}
        for device, median_s in medians.items():
            where = "" if medians.keys() == {"cpu"} else f" on {device}"
            counts = f"{found.threads} threads, {chosen.rounds} samples of each"
            print(f"original{where}: median {median_s * 1e3:.2f} ms, {counts}")
        table(rows, ("ENGINE", "MEDIAN MS", "P90 MS", "RATIO [95 %]"))
        for name, t in found.runners.items():
            for warning in t.warnings:
                print(f"{name}: {warning}")
        for name, reason in found.not_measured.items():
            print(f"{name}: not measured ({reason})")

    runners = {name: t.model_dump(mode="json") for name, t in found.runners.items()}
    answer(chosen, {"runners": runners, "not_measured": dict(found.not_measured)}, text)
    return DONE


def compare_command(chosen: Namespace) -> int:
    """Fidelity of the second subject's runners to the first's."""
    from enginewright import api

    found = api.compare(
        chosen.original,
        chosen.candidate,
        gates=chosen.gate,
        calls=chosen.calls,
        source=chosen.source,
        trust_code=chosen.trust_code,
        quiet=chosen.quiet,
    )
    records, gates = found.runners, found.gates
    answer(
        chosen,
        comparison_data(found.original, records, gates),
        lambda: tell_comparison(found.original, found.calls, records, gates),
    )
    code = gate_code(gate.verdict for gate in gates)
    nothing = any(not record.fidelity for record in records)
    return MISSED if any(record.faults for record in records) else code or (CANNOT if nothing else DONE)


def comparison_data(name: str, records: Sequence[Any], gates: Sequence[Any]) -> dict[str, Any]:
    """The answer of ``compare`` as JSON."""
    runners = [
        {
            "name": each.name,
            "faults": each.faults,
            "fidelity": [output.model_dump(mode="json") for output in each.fidelity],
            **({"reason": each.reason} if each.reason else {}),
        }
        for each in records
    ]
    return {"original": name, "runners": runners, "gates": [gate.model_dump(mode="json") for gate in gates]}


def tell_comparison(name: str, calls: int, records: Sequence[Any], gates: Sequence[Any]) -> None:
    """The answer of ``compare`` as text."""
    from enginewright.reports import summary, words

    rows = [
        (
            each.name,
            output.output,
            words.number(output.max_abs),
            words.number(output.relative_l2),
            words.number(output.worst_column),
            f"{output.cosine:.9f}",
            "; ".join(filter(None, (summary.calls(output), summary.rows(output)))),
        )
        for each in records
        for output in each.fidelity
    ]
    print(f"beside {name}, {words.plural(calls, 'call')}:")
    table(rows, ("RUNNER", "OUTPUT", "MAX ABS", "RELATIVE L2", "WORST COLUMN", "COSINE", "CALLS"))
    for each in records:
        for text in (*each.faults, *each.not_compared, each.reason):
            if text:
                print(f"{each.name}: {text}")
    for gate in gates:
        print(f"{gate.target}: {gate.name} {gate.bound}: {words.VERDICT[gate.verdict]} {gate.reason}".rstrip())


def gate_code(verdicts: Iterable[str]) -> int:
    """Exit code of some gates."""
    found = set(verdicts)
    return MISSED if "missed" in found else CANNOT if found - {"met"} else DONE


def check_command(chosen: Namespace) -> int:
    """Hold an artifact's figures against a baseline."""
    from enginewright import artifact
    from enginewright.asking import place_for
    from enginewright.ground.writing import write_where_told
    from enginewright.reports import junit, record
    from enginewright.validation import regression

    place_for(chosen.junit)
    given = dict(regression.figure_given(text) for text in chosen.figure)
    there = (chosen.artifact / artifact.MANIFEST).is_file()
    wanted = regression.read(chosen.baseline) if there and not chosen.update else None
    # After the baseline, because it reads every file.
    artifact.check_report(chosen.artifact, artifact.read_manifest(chosen.artifact))
    report = record.read(chosen.artifact / artifact.REPORT)
    content = json.loads((chosen.artifact / artifact.REPORT).read_text())
    if wanted is None:
        return update_baseline(chosen, content, given)
    comparisons = regression.check(wanted, content, given)
    failed = [c for c in comparisons if c.failed]
    blind = {c.key: c.reason for c in comparisons if c.verdict == "not_comparable"}
    if chosen.junit:
        cases = [(c.key, c.reason or f"was {c.baseline}, is {c.current}" if c.failed else "") for c in comparisons]
        write_where_told(chosen.junit, junit.render_cases(report.model.name, cases, blind), what="the JUnit file")

    def text() -> None:
        print(regression.render_table(comparisons))
        said = f"{len(failed)} of {len(comparisons)} figures regressed" if failed else "nothing regressed"
        print(f"{said}; {len(blind)} could not be compared" if blind else said)

    answer(
        chosen,
        {
            "regressed": len(failed),
            "not_comparable": len(blind),
            "figures": [vars(c) | {"tolerance": str(c.tolerance)} for c in comparisons],
        },
        text,
    )
    return MISSED if failed else DONE


def update_baseline(chosen: Namespace, content: dict[str, Any], given: dict[str, Any]) -> int:
    """Write a baseline of a run, and say which of its figures are none."""
    from enginewright.ground.writing import in_words, make_folder
    from enginewright.validation import regression

    keep = regression.read(chosen.baseline) if chosen.baseline.exists() else None
    baseline = regression.baseline_from(content, keep=keep, given=given)
    without = regression.left_out(content)
    with in_words("the baseline", chosen.baseline):
        make_folder(chosen.baseline.parent)
    regression.write(chosen.baseline, baseline)

    def text() -> None:
        print(f"wrote {chosen.baseline}: {len(baseline.figures)} figures")
        for key, reason in without.items():
            print(f"left out {key}: {reason}")

    answer(chosen, {"wrote": str(chosen.baseline), "figures": len(baseline.figures), "left_out": without}, text)
    return DONE


def report_command(chosen: Namespace) -> int:
    """Render again."""
    from enginewright import artifact
    from enginewright.reports import record, rendering

    artifact.heal_absent(chosen.artifact)
    place = chosen.artifact / artifact.MANIFEST
    if place.is_file() and "report" in (manifest := artifact.read_manifest(chosen.artifact)):
        artifact.check_report(chosen.artifact, manifest)
    report = record.read(chosen.artifact / artifact.REPORT)
    rendering.write_all(report, chosen.artifact)
    names = ["report.html", "report.md", "junit.xml"]
    answer(chosen, {"wrote": names}, lambda: print(f"wrote {', '.join(names)} in {chosen.artifact}"))
    return DONE


def doctor_command(chosen: Namespace) -> int:
    """The four answers of every target, and the machine."""
    from enginewright import environment

    targets = []
    for name in catalog.entries("targets"):
        able = catalog.target_class(name)().availability()
        answers = {key: getattr(able, key) for key in ("installed", "importable", "buildable", "runnable")}
        reason = next((given.reason for given in answers.values() if not given.yes), "")
        targets.append({"name": name, **{key: given.yes for key, given in answers.items()}, "reason": reason})
    data = {
        "targets": targets,
        "problems": environment.problems(),
        "environment": environment.describe(),
        "versions": environment.versions(),
    }

    def text() -> None:
        keys = ("installed", "importable", "buildable", "runnable")
        rows = [(str(t["name"]), *("yes" if t[key] else "no" for key in keys), str(t["reason"])) for t in targets]
        table(rows, ("TARGET", *(key.upper() for key in keys), "WHY NOT"))
        for problem in environment.problems():
            print(f"problem: {problem}")
        print()
        for section in (environment.describe(), environment.versions()):
            table([(key, str(value)) for key, value in section.items()], ("", ""))

    answer(chosen, data, text)
    return DONE
