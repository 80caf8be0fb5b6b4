from __future__ import annotations

import pytest

from enginewright import cli, environment


def test_two_packages_of_onnxruntime_are_a_problem_that_doctor_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "versions", lambda: {"onnxruntime": "1.32.0"})
    assert environment.problems() == []
    monkeypatch.setattr(environment, "versions", lambda: {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"})
    assert cli.main(["doctor"]) == 0
    assert "problem: onnxruntime and onnxruntime-gpu are both installed" in capsys.readouterr().out
