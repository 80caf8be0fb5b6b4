from __future__ import annotations

from reports import markdown
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
