from __future__ import annotations

from enginewright.reports import markdown
from tests.reports.example import HOSTILE_PATH, example_report


def test_it_holds_verdict_gates_targets_and_steps() -> None:
    report = example_report()
    text = markdown.render(report)
    assert text.startswith("## ✗ dit:digits: missed")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len([row for row in rows if "fidelity.cosine" in row]) == 1
    assert all(len(row.replace(r"\|", "").split("|")) in (7, 8) for row in rows)
    assert sum(line.startswith("* **") for line in text.splitlines()) == len(report.steps)
    assert "not measured" in text


def test_hostile_names_stay_in_their_cell() -> None:
    report = example_report()
    report.gates[0].reason = f"a | b\n# c {HOSTILE_PATH} `d` [e](f)"
    text = markdown.render(report)
    assert "<script" not in text
    line = next(line for line in text.splitlines() if "# c" in line)
    assert r"a \| b # c" in line
    assert r"\[e\](f)" in line


def test_without_gates_or_targets_it_stays_readable() -> None:
    report = example_report().model_copy(update={"gates": [], "targets": [], "steps": []})
    assert "|" not in markdown.render(report).replace(r"\|", "")


def test_faster_is_said_with_the_time_beside_fp32() -> None:
    report = example_report()
    report.targets[0].fp32_ratio = 1.0917
    row = next(line for line in markdown.render(report).splitlines() if line.startswith("| onnxruntime | 3.05 MB"))
    assert "1.58x faster than the original in PyTorch" in row
    assert "NOT faster than the same graph in fp32 in the same runtime: 1.09 of its time" in row


def test_a_run_without_gates_that_was_measured_is_done() -> None:
    report = example_report().model_copy(update={"gates": [], "verdict": "not_measured"})
    assert markdown.render(report).startswith("## • dit:digits: done, no gates asked")
