"""The commands as functions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import enginewright
from enginewright.ground.errors import ToolchainError
from tests.conftest import ROOT


def test_the_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text().partition("### In Python")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(found[1], names)
    report = names["report"]
    assert report.verdict == "met"  # type: ignore[attr-defined]
    assert [step.name for step in report.steps] == ["prune_heads", "quantize_int8"]  # type: ignore[attr-defined]
    assert all(step.changed for step in report.steps)  # type: ignore[attr-defined]
    assert (tmp_path / "small" / "report.html").is_file()


def test_what_is_public_is_there_and_loads_nothing_before_it_is_used() -> None:
    code = (
        "import sys, enginewright\n"
        "assert set(enginewright.__all__) <= set(dir(enginewright))\n"
        "print(sorted({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))\n"
        "for name in enginewright.__all__: assert getattr(enginewright, name).__doc__\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = enginewright.nope


def test_a_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [decision] = enginewright.plan("dit:tiny", ["prune_heads:share=0.5"])
    assert decision.step.macs.after < decision.step.macs.before
    assert decision.plan.choice
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_opened_compared_and_timed(artifact: Path) -> None:
    opened = enginewright.open(artifact)
    assert set(opened.runners) == {"onnxruntime"}
    assert set(opened.absent) == {"tensorrt"}
    found = enginewright.compare("dit:tiny", opened, gates=["fidelity.cosine >= 0.9"])
    assert [gate.verdict for gate in found.gates] == ["met"]
    assert found.calls == 2, "as many as it was validated on"
    timed = enginewright.bench(artifact, rounds=3, sizes={"batch": 2})
    assert timed.runners["onnxruntime"].shapes["x"][0] == 2
    assert timed.not_measured.keys() == {"tensorrt"}


def test_what_is_wrong_is_one_clear_error(tmp_path: Path, artifact: Path) -> None:
    with pytest.raises(ToolchainError, match="did you mean 'prune_heads'"):
        enginewright.export("dit:tiny", tmp_path / "out", ["prune_head"])
    with pytest.raises(ToolchainError, match="exists"):
        enginewright.export("dit:tiny", artifact)
    with pytest.raises(ToolchainError, match="is a recipe, which says its own steps"):
        enginewright.plan(artifact / "recipe.toml", ["prune_heads"])
    with pytest.raises(ToolchainError, match="nothing to time it against"):
        enginewright.bench("dit:tiny")
    assert not (tmp_path / "out").exists()


def test_a_recipe_runs_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text("schema = 1\nmodel = 'dit:tiny'\n[validation]\nskip = true\n")
    assert enginewright.export(path, tmp_path / "out").verdict == "not_measured"
