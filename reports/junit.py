"""The report as JUnit XML: a suite a target, a case a gate; what was not measured is skipped, not passed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from enginewright.reports import summary, words
from enginewright.reports.record import Gate, Report, TargetRecord

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, even escaped."""


def render(report: Report) -> str:
    """JUnit XML of a run."""
    root = ElementTree.Element("testsuites", name=clean(f"enginewright {report.model.name}"))
    by_target: dict[str, list[Gate]] = {target.name: [] for target in report.targets}
    for gate in report.gates:
        by_target.setdefault(gate.target, []).append(gate)
    known = {target.name: target for target in report.targets}
    for name, gates in by_target.items():
        suite = ElementTree.SubElement(root, "testsuite", name=clean(name))
        if name in known:
            build_case(suite, report, known[name])
        for gate in gates:
            case = add_case(suite, name, f"{gate.name} {gate.bound}")
            if gate.verdict == "missed":
                mark(case, "failure", gate.reason or f"value is {gate.value}")
            elif gate.verdict != "met":
                said = words.VERDICT[gate.verdict]
                mark(case, "skipped", f"{said}: {gate.reason}" if gate.reason else said)
    return finished(root)


def build_case(suite: ElementTree.Element, report: Report, target: TargetRecord) -> None:
    """The case that the engine is there and usable."""
    case = add_case(suite, target.name, "built and usable")
    if target.faults:
        mark(case, "error", "; ".join(target.faults))
    elif not target.built:
        mark(case, "skipped" if target.optional else "error", summary.why_not_measured(report, target))
    elif not target.runnable or not target.fidelity:
        mark(case, "skipped", f"built, but not measured: {summary.why_not_measured(report, target)}")


def render_cases(name: str, cases: Sequence[tuple[str, str]], skipped: Mapping[str, str] | None = None) -> str:
    """JUnit XML of checks, each a name and why it failed; empty when it did not.

    Args:
        name: of the suite.
        cases: what was checked.
        skipped: by name, why a check that did not fail was not made at all.
    """
    root = ElementTree.Element("testsuites", name=clean(name))
    suite = ElementTree.SubElement(root, "testsuite", name=clean(name))
    for label, failure in cases:
        case = add_case(suite, name, label)
        if failure:
            mark(case, "failure", failure)
        elif reason := (skipped or {}).get(label):
            mark(case, "skipped", reason)
    return finished(root)


def add_case(suite: ElementTree.Element, group: str, name: str) -> ElementTree.Element:
    """A test case, passed so far."""
    return ElementTree.SubElement(suite, "testcase", classname=clean(group), name=clean(name))


def mark(case: ElementTree.Element, outcome: str, reason: str) -> None:
    """Say that a case did not pass."""
    ElementTree.SubElement(case, outcome, message=clean(reason))


def finished(root: ElementTree.Element) -> str:
    """The document, with totals counted from its cases."""
    for group in (*root, root):
        cases = group.findall(".//testcase")
        group.set("tests", str(len(cases)))
        for total, outcome in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            group.set(total, str(sum(case.find(outcome) is not None for case in cases)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def clean(text: str) -> str:
    """Text without characters that XML cannot hold."""
    return FORBIDDEN.sub("", text)
