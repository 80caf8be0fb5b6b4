"""The report as a command says it when it ends: verdict, gates, targets, steps and doubts, as lines and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enginewright.reports import summary, words
from enginewright.reports.record import Report, Step, TargetRecord


@dataclass(frozen=True)
class Line:
    """A sentence, and how it is meant: a verdict's name, ``quiet`` or ``doubt``."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Rows:
    """A table."""

    heads: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def blocks(report: Report) -> list[Line | Rows]:
    """Everything, in the order of its weight."""
    found: list[Line | Rows] = [
        Line(f"{summary.glyph(report)} {report.model.name}: {summary.outcome(report)}", report.verdict)
    ]
    if report.gates:
        found += [Line(summary.headline(report)), gates(report)]
    found += [Line(""), *(Line(f"{target.name}: {sentence_on(report, target)}") for target in report.targets)]
    measured = [target for target in report.targets if target.fidelity or target.quality]
    if measured:
        found.append(Rows(("TARGET", "COPY", "COSINE", "RELATIVE L2", "QUALITY"), [row(each) for each in measured]))
    found += [Line(""), *(Line(step_line(step), "quiet") for step in report.steps)]
    found += [Line(f"doubt about {name}: {text}", "doubt") for name, text in summary.warnings(report)]
    return [
        block for i, block in enumerate(found) if not (is_gap(block) and (i + 1 == len(found) or is_gap(found[i + 1])))
    ]


def is_gap(block: Line | Rows) -> bool:
    """Whether a block is an empty line."""
    return isinstance(block, Line) and not block.text


def gates(report: Report) -> Rows:
    """Bounds, values and verdicts."""
    return Rows(("GATE", "TARGET", "BOUND", "VALUE", "REASON"), summary.gate_rows(report))


def sentence_on(report: Report, target: TargetRecord) -> str:
    """One target in a sentence: what is to be copied, how fast."""
    if not target.built:
        return f"not built: {summary.why_not_measured(report, target)}"
    built = f"copy {summary.place(target)}, {words.size(target.bytes)}" if target.folders else "built"
    if target.latency is None:
        return f"{built}; not measured: {summary.why_not_measured(report, target)}"
    return f"{built}; {summary.speed(report, target)}"


def row(target: TargetRecord) -> tuple[str, ...]:
    """Figures of one target."""
    quality = ", ".join(
        f"{figure.name} {words.figure(figure.value, figure.unit)}"
        for figure in target.quality
        if figure.value is not None
    )
    size = words.size(target.bytes)
    return (target.name, size, summary.worst_cosine(target), summary.worst_relative_l2(target), quality)


def step_line(step: Step) -> str:
    """What one step changed, and the commonest reason to leave layers alone."""
    line = f"{step.label} changed {words.plural(len(step.changed), 'layer')}"
    line += f", {words.size(step.bytes.before)} -> {words.size(step.bytes.after)} of weights"
    if reasons := summary.skip_reasons(step):
        reason, count = reasons[0]
        line += f"; left {len(step.skipped)} alone, {count} of them: {reason}"
    return line
