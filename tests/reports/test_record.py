from __future__ import annotations

import json
from pathlib import Path

import pytest

from enginewright.ground.errors import FaultsError, ToolchainError
from enginewright.reports import record
from tests.reports.example import example_report


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record.write(example_report(), tmp_path / "report.json")
    assert record.read(tmp_path / "report.json") == example_report()
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == 1


def test_faults_are_named_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    record.write(example_report(), path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ToolchainError, match="not JSON"):
        record.read(path)
    path.write_text("[]")
    with pytest.raises(ToolchainError, match="schema 'list'"):
        record.read(path)
    content = json.loads(whole)
    path.write_text(json.dumps({**content, "schema": 9}))
    with pytest.raises(ToolchainError, match="schema 9; this version reads 1"):
        record.read(path)
    path.write_text(json.dumps({**content, "colour": "red", "seconds": "long"}))
    with pytest.raises(FaultsError) as caught:
        record.read(path)
    assert "colour" in str(caught.value)
    assert "'long'" in str(caught.value)
    with pytest.raises(ToolchainError, match="no report"):
        record.read(tmp_path / "gone.json")


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    report = example_report()
    report.targets[0].fidelity[0].max_abs = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        record.write(report, tmp_path / "report.json")


def test_a_report_of_an_older_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    record.write(example_report(), path)
    content = json.loads(path.read_text())
    for target in content["targets"]:
        for new in ("files", "folders", "fp32_ratio"):
            del target[new]
    path.write_text(json.dumps(content))
    assert record.read(path) == example_report()
