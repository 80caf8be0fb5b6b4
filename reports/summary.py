"""What a record amounts to, in sentences and picked figures that every rendering shares."""

from __future__ import annotations

import math
from collections import Counter

from enginewright.reports import words
from enginewright.reports.record import (
    Fidelity,
    Latency,
    ModelRecord,
    Report,
    SizeCheck,
    Step,
    TargetRecord,
    TokenMap,
)

UNTOUCHED = "the untouched original"
"""What engines are compared with unless a step means to compute something else."""


def outcome(report: Report) -> str:
    """How a run ended, in words; one that was measured and asked for no gates is done, and not unmeasured."""
    if report.verdict == "not_measured" and not report.gates:
        if any(target.fidelity or target.latency for target in report.targets):
            return "done, no gates asked"
        if not report.targets:
            return "done, no targets asked"
    missed = sum(gate.verdict == "missed" for gate in report.gates)
    if missed:
        return f"missed {missed} of {words.plural(len(report.gates), 'gate')}"
    if report.verdict == "met" and all(gate.verdict == "met" for gate in report.gates):
        return f"met {'its gate' if len(report.gates) == 1 else f'all {len(report.gates)} gates'}"
    return words.VERDICT[report.verdict]


def glyph(report: Report) -> str:
    """The sign of the outcome; that of something met only where something was asked."""
    return "•" if outcome(report).startswith("done") else words.GLYPH[report.verdict]


def headline(report: Report) -> str:
    """How many gates were met, missed and not measured."""
    if not report.gates:
        return "No gates were asked for, so there is nothing to meet or to miss."
    counts = Counter(gate.verdict for gate in report.gates)
    parts = [f"{counts[verdict]} {word}" for verdict, word in words.VERDICT.items() if counts[verdict]]
    faulty = [target.name for target in report.targets if target.faults]
    faults = f" Unusable: {words.listing(faulty)}." if faulty else ""
    absent = [target.name for target in report.targets if not (target.optional or target.fidelity or target.faults)]
    missing = f" Not measured, and not optional: {words.listing(absent)}." if absent else ""
    return f"Of {words.plural(len(report.gates), 'gate')}: {words.listing(parts)}.{faults}{missing}"


def paragraph(report: Report) -> str:
    """What was done and what it brought."""
    return " ".join([_done(report), *(target_sentence(report, target) for target in report.targets)])


def _done(report: Report) -> str:
    model = report.model
    came = f"{model.name} ({words.amount(model.parameter_count)} parameters, {words.size(model.bytes)} of weights)"
    if not report.steps:
        return f"{came} was exported as it is."
    if report.parts:
        steps = words.listing([step.label for step in report.steps])
        return f"{came} is a pipeline of {words.listing([part.name for part in report.parts])}; steps: {steps}."
    after = words.size(report.steps[-1].bytes.after)
    steps = words.listing([step.name for step in report.steps])
    return f"{came} went through {steps}, which left {after} of weights."


def target_sentence(report: Report, target: TargetRecord) -> str:
    """One target: built or not, how large, how fast, how far off."""
    if not target.built:
        return f"{target.name} was not built: {why_not_measured(report, target)}."
    built = (
        f"{target.name} was built: {words.size(report.weights_of(target))} of weights became {words.size(target.bytes)}"
    )
    if target.folders:
        built += f" to copy ({place(target)})"
    if target.faults:
        return f"{built}, but it is unusable: {target.faults[0]}."
    if not target.fidelity and target.latency is None:
        return f"{built}; neither speed nor fidelity was measured: {why_not_measured(report, target)}."
    return f"{built}; {_speed(report, target)}; {_nearness(report, target)}."


def _speed(report: Report, target: TargetRecord) -> str:
    timed = target.latency
    if timed is None:
        return f"its speed was not measured: {why_not_measured(report, target)}"
    if timed.unsafe:
        ratio = words.interval(timed.ratio, timed.ratio_low, timed.ratio_high)
        where = devices(timed)
        said = f"{ratio} of the original's time{f', {where},' if where else ','} from samples that are unsafe"
        return f"whether it is faster is open: {said}"
    return speed(report, target)


def speed(report: Report, target: TargetRecord) -> str:
    """How fast an engine is beside the original and, where that is known, beside the same graph in fp32."""
    timed = target.latency
    if timed is None:
        return words.NOT_MEASURED
    where = f" ({found})" if (found := devices(timed)) else ""
    if timed.unsafe:
        ratio = words.interval(timed.ratio, timed.ratio_low, timed.ratio_high)
        return f"{words.VERDICT['inconclusive']}: {ratio}{where}"
    first = f"{words.times(timed.ratio, timed.ratio_low, timed.ratio_high, original(report))}{where}"
    return first if target.fp32_ratio is None else f"{first}; {words.beside_fp32(target.fp32_ratio)}"


def devices(timed: Latency) -> str:
    """Where an engine and the original were timed, and whether copies are in the times; empty where all is the CPU."""
    if timed.device == timed.original_device == "cpu":
        return ""
    copies = "copies from and to the host are timed" if timed.copies_timed else "inputs on the device"
    if timed.device == timed.original_device:
        return f"both on {timed.device}, {copies}"
    return f"the engine on {timed.device}, {copies}; the original on {timed.original_device}"


def original(report: Report) -> str:
    """What engines are timed against: modules run in PyTorch, graphs in ONNX Runtime."""
    return "the original in ONNX Runtime" if report.model.name.startswith("onnx:") else "the original in PyTorch"


def place(target: TargetRecord) -> str:
    """What has to be copied for an engine to run elsewhere."""
    return words.listing(target.folders)


def calls(output: Fidelity) -> str:
    """Over how many calls an output was compared, which was the worst, and how far off the middle one is."""
    if output.calls is None:
        return ""
    if output.calls == 1:
        return "1 call"
    said = f"worst of {output.calls} calls, call {output.worst_call}"
    middle = output.median.get("relative_l2")
    return said if middle is None else f"{said}; median {words.number(middle)}"


def rows(output: Fidelity) -> str:
    """Over which rows the figures are, where an input marks the real ones."""
    all_rows = output.everywhere.get("relative_l2")
    if not output.mask or all_rows is None:
        return ""
    return f"over the rows that {output.mask} keeps; over all rows {words.number(all_rows)}"


def reference_sentence(report: Report) -> str:
    """What the engines were held against; steps that mean to compute something else are on both sides."""
    reference = str(report.validation.get("reference") or "the original")
    said = f"{reference[:1].upper()}{reference[1:]} and every engine that runs here got the same inputs."
    if reference in (UNTOUCHED, "the original"):
        return said
    return f"{said} What those steps intend is on both sides; a line of its own holds the untouched original."


def _nearness(report: Report, target: TargetRecord) -> str:
    if not target.fidelity:
        return f"its fidelity was not measured: {why_not_measured(report, target)}"
    worst = _furthest(target)
    cosine = worst_cosine(target)
    off = f"its worst output, {worst.output}, is off by {words.number(worst.relative_l2)} in relative L2"
    how = "; ".join(filter(None, (calls(worst), rows(worst))))
    return f"{off}{f' ({how})' if how else ''}; the lowest cosine is {cosine}"


def worst_cosine(target: TargetRecord) -> str:
    """The lowest cosine over the outputs."""
    values = [output.cosine for output in target.fidelity]
    return words.cosine(min(values)) if values else words.NOT_MEASURED


def worst_relative_l2(target: TargetRecord) -> str:
    """The largest relative L2 over the outputs."""
    if not target.fidelity:
        return words.NOT_MEASURED
    return words.number(_furthest(target).relative_l2)


def how_compared(target: TargetRecord) -> str:
    """Calls and rows behind the worst relative L2; empty where nothing was compared."""
    if not target.fidelity:
        return ""
    worst = _furthest(target)
    half = max((output.relative_l2 for output in target.fidelity_in_half), default=None)
    in_half = "" if half is None else f"in true half precision {words.number(half)}"
    doubt = "no gate rests on it" if target.doubt else ""
    return "; ".join(filter(None, (calls(worst), rows(worst), in_half, beside_original(target), doubt)))


def beside_original(target: TargetRecord) -> str:
    """How far an engine is from the untouched original; empty where that is what the other figures are against."""
    if not target.fidelity_to_original:
        return ""
    worst = max(target.fidelity_to_original, key=lambda output: output.relative_l2)
    return f"to the untouched original {words.number(worst.relative_l2)}"


def _furthest(target: TargetRecord) -> Fidelity:
    return max(target.fidelity, key=lambda output: output.relative_l2)


def why_not_measured(report: Report, target: TargetRecord) -> str:
    """Why a target has no figures."""
    reasons = [*target.faults[:1], target.reason, str(report.validation.get("skipped") or "")]
    return next(filter(None, reasons), "the record gives no reason").rstrip(".")


def sizes_run(target: TargetRecord) -> str:
    """At which sizes beside the typical ones an engine was run, and which were left out; empty where there are none."""
    done = [sizes_text(check) for check in target.sizes if check.verdict != "not_measured"]
    left = [f"{sizes_text(check)} ({check.reason})" for check in target.sizes if check.verdict == "not_measured"]
    parts = [f"also run at {'; '.join(done)}" if done else "", f"not measured at {'; '.join(left)}" if left else ""]
    return "; ".join(filter(None, parts))


def sizes_text(check: SizeCheck) -> str:
    """Sizes, such as ``batch 1, time 11``."""
    return ", ".join(f"{name} {size}" for name, size in check.sizes.items())


def gate_rows(report: Report) -> list[tuple[str, ...]]:
    """Each gate's verdict, target, bound, value and reason."""
    return [
        (
            f"{words.GLYPH[gate.verdict]} {words.VERDICT[gate.verdict]}",
            gate.target,
            f"{gate.name} {gate.bound}",
            words.figure(gate.value),
            gate.reason,
        )
        for gate in report.gates
    ]


def has_quality(report: Report) -> bool:
    """Whether anything is to be said of whole sampling runs: a figure, a gate on one, or that they were not run."""
    asked = any(gate.name.startswith("quality.") for gate in report.gates)
    return asked or bool(report.samples) or any(target.quality for target in report.targets)


def skip_reasons(step: Step) -> list[tuple[str, int]]:
    """Each reason for leaving a layer alone and how many layers it held for, the most common first."""
    return Counter(skip.reason for skip in step.skipped).most_common()


def left_out(model: ModelRecord) -> list[tuple[str, list[str]]]:
    """Each reason for leaving inputs out, and their names."""
    by_reason: dict[str, list[str]] = {}
    for entry in model.inputs_left_out:
        by_reason.setdefault(entry.reason, []).append(entry.name)
    return list(by_reason.items())


def tokens_left(tokens: TokenMap) -> str:
    """How many tokens of an input passed every border."""
    left = [passed for row in tokens.left for passed in row]
    return f"{sum(passed == tokens.borders for passed in left)} of {len(left)} stay"


def warnings(report: Report) -> list[tuple[str, str]]:
    """Target and what to doubt or mend about it."""
    found = []
    for target in report.targets:
        doubts = target.latency.warnings if target.latency else []
        zeros = [
            f"output {output.output!r} is 0 in the original and not in the engine: its relative error is infinite"
            for output in target.fidelity
            if math.isinf(output.relative_l2)
        ]
        found += [(target.name, text) for text in (*target.faults, *target.not_compared, *zeros, *doubts)]
    return found
