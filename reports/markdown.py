"""The report as a comment on a pull request: verdict, gates, targets, steps, doubts."""

from __future__ import annotations

from collections.abc import Sequence

from enginewright.reports import summary, words
from enginewright.reports.record import Report, Step, TargetRecord


def render(report: Report) -> str:
    """GitHub-flavoured Markdown; what comes from the record cannot break out of its cell."""
    parts = [
        f"## {summary.glyph(report)} {plain(report.model.name)}: {summary.outcome(report)}",
        plain(summary.headline(report)),
        gates(report),
        targets(report),
        "\n".join(f"* **{plain(t.name)}** {plain(text)}" for t in report.targets if (text := summary.sizes_run(t))),
        "\n".join(step_line(step) for step in report.steps),
        source(report),
        "\n".join(f"> **{plain(name)}**: {plain(text)}" for name, text in summary.warnings(report)),
        "\n".join(f"* {plain(note)}" for note in report.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def source(report: Report) -> str:
    """What the model's source chose, added and left out."""
    absent = [f"not an input: {', '.join(names)} ({reason})" for reason, names in summary.left_out(report.model)]
    return "\n".join(f"* {plain(line)}" for line in (*report.model.notes, *absent))


def gates(report: Report) -> str:
    """Bounds, values and verdicts."""
    rows = summary.gate_rows(report)
    return table(("Gate", "Target", "Bound", "Value", "Reason"), rows) if rows else ""


def targets(report: Report) -> str:
    """One line a target: size, speed, nearness, quality; or why not."""
    rows = [target_row(report, target) for target in report.targets]
    return (
        table(("Target", "To copy", "Time of a call, original = 1", "Cosine", "Relative L2", "Quality"), rows)
        if rows
        else ""
    )


def target_row(report: Report, target: TargetRecord) -> tuple[str, ...]:
    """Figures of one target."""
    size = words.size(target.bytes) if target.built else "not built"
    if not target.fidelity and target.latency is None:
        return (target.name, size, f"not measured: {summary.why_not_measured(report, target)}", "", "", "")
    timed = target.latency
    speed = words.interval(timed.ratio, timed.ratio_low, timed.ratio_high) if timed else words.NOT_MEASURED
    if timed and not timed.unsafe:
        speed += f": {summary.speed(report, target)}"
    elif timed:
        speed = summary.speed(report, target)
    how = summary.how_compared(target)
    error = f"{summary.worst_relative_l2(target)} ({how})" if how else summary.worst_relative_l2(target)
    quality = ", ".join(
        f"{figure.name} {words.figure(figure.value, figure.unit)}"
        for figure in target.quality
        if figure.value is not None
    )
    return (target.name, size, speed, summary.worst_cosine(target), error, quality)


def step_line(step: Step) -> str:
    """What one step changed, and the commonest reason to leave layers alone."""
    line = f"* **{plain(step.label)}** changed {words.plural(len(step.changed), 'layer')}"
    line += f", {words.size(step.bytes.before)} -> {words.size(step.bytes.after)}"
    reasons = summary.skip_reasons(step)
    if reasons:
        reason, count = reasons[0]
        line += f"; left {len(step.skipped)} alone, {count} of them: {plain(reason)}"
    return "\n".join([line, *(f"  * {plain(note)}" for note in step.notes)])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(plain(cell) for cell in line)} |" for line in lines)


def plain(text: str) -> str:
    """Text with nothing in it that Markdown, HTML or a table would act on."""
    for mark in "\\`*_[]|<>":
        text = text.replace(mark, {"<": "&lt;", ">": "&gt;"}.get(mark, f"\\{mark}"))
    return " ".join(text.split())
