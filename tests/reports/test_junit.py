from __future__ import annotations

from xml.etree import ElementTree

from enginewright.reports import junit
from tests.reports.example import example_report


def test_met_passes_missed_fails_and_not_measured_is_skipped() -> None:
    root = ElementTree.fromstring(junit.render(example_report()))
    assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("1", "0", "2")
    by_name = {f"{case.get('classname')} {case.get('name')}": case for case in root.iter("testcase")}
    for gate in example_report().gates:
        case = by_name[f"{gate.target} {gate.name} {gate.bound}"]
        outcome = {"met": [], "missed": ["failure"], "not_measured": ["skipped"]}[gate.verdict]
        assert [child.tag for child in case] == outcome
        assert all(child.get("message") for child in case)
    assert root.get("tests") == str(len(by_name)) == str(len(example_report().gates) + 2)


def test_an_engine_that_is_faulty_or_missing_is_an_error_unless_optional() -> None:
    report = example_report()
    report.targets[0].faults = ["output 'y' holds NaN"]
    report.targets[1].built = False
    root = ElementTree.fromstring(junit.render(report))
    assert root.get("errors") == "2"
    report.targets[1].optional = True
    assert ElementTree.fromstring(junit.render(report)).get("errors") == "1"


def test_characters_that_xml_cannot_hold_are_left_out() -> None:
    root = ElementTree.fromstring(junit.render_cases("a\x00b", [("c\x1b[1m <d>", "e & \ud800f"), ("fine", "")]))
    case = next(root.iter("testcase"))
    assert (root.get("name"), case.get("name")) == ("ab", "c[1m <d>")
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("message") == "e & f"
    assert (root.get("tests"), root.get("failures")) == ("2", "1")


def test_an_engine_that_could_not_run_here_is_not_usable_in_green() -> None:
    root = ElementTree.fromstring(junit.render(example_report()))
    usable = {case.get("classname"): case for case in root.iter("testcase") if case.get("name") == "built and usable"}
    assert list(usable["onnxruntime"]) == []
    (skipped,) = usable["tensorrt_rtx"]
    assert skipped.tag == "skipped"
    assert "no NVIDIA driver" in str(skipped.get("message"))


def test_inconclusive_is_skipped_with_its_reason() -> None:
    report = example_report()
    report.gates[0].verdict, report.gates[0].reason = "inconclusive", "other programs interrupted it"
    case = next(
        each for each in ElementTree.fromstring(junit.render(report)).iter("testcase") if ">=" in each.get("name")
    )
    assert [(child.tag, child.get("message")) for child in case] == [
        ("skipped", "inconclusive: other programs interrupted it")
    ]


def test_a_check_that_was_not_made_is_skipped_unless_it_failed() -> None:
    text = junit.render_cases("m", [("a", ""), ("b", ""), ("c", "worse")], {"b": "another CPU", "c": "another CPU"})
    root = ElementTree.fromstring(text)
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("3", "1", "1")
