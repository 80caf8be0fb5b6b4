"""Another package adds a pass, a target, a model and a metric, and nothing of ours is edited."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXAMPLE = ROOT / "tests" / "example_plugin"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def with_example(tmp_path: Path) -> Run:
    """The command line where the example package is installed: its files, and what pip would write beside them."""
    place = tmp_path / "site"
    shutil.copytree(EXAMPLE / "enginewright_example", place / "enginewright_example")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = place / "enginewright_example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: enginewright-example\nVersion: 1.0\n")
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {module}" for name, module in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH", ""))))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "enginewright", *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_what_another_package_adds_is_listed_and_shown(with_example: Run) -> None:
    for kind, name in (("passes", "halve_biases"), ("targets", "doubling"), ("models", "two_layers")):
        found = json.loads(with_example("list", kind, "--json").stdout)
        assert name in [entry["name"] for entry in found]
    metrics = json.loads(with_example("list", "metrics", "--json").stdout)
    assert {"fidelity.mean_square", "fidelity_to_original.mean_square"} <= {entry["name"] for entry in metrics}
    shown = with_example("show", "halve_biases")
    assert shown.returncode == 0
    assert "what each bias is multiplied by" in shown.stdout


def test_all_of_it_works_in_one_run_and_in_a_check(with_example: Run, tmp_path: Path) -> None:
    gates = ["--gate", "fidelity.mean_square <= 0.5", "--gate", "fidelity.mean_square >= 1e-9"]
    asked = ["two_layers:tiny", "--pass", "halve_biases:by=0.9", "--target", "doubling", "--target", "onnxruntime"]
    run = with_example("export", *asked, *gates, "--rounds", 3, "-o", "out", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["steps"][0]["changed"] == ["first", "second"]
    assert [gate["verdict"] for gate in report["gates"]] == ["met"] * 4
    for target in report["targets"]:
        assert 0 < target["fidelity"][0]["more"]["mean_square"] < 0.5
    assert "mean_square" in (tmp_path / "out" / "report.html").read_text()
    assert with_example("check", "out", "--baseline", "b.json", "--update").returncode == 0
    figures = json.loads((tmp_path / "b.json").read_text())["figures"]
    assert "onnxruntime/fidelity.mean_square/y" in figures
    assert with_example("check", "out", "--baseline", "b.json").returncode == 0


def test_its_facts_hold_in_recipes(with_example: Run) -> None:
    twice = ["--pass", "halve_biases", "--pass", "halve_biases"]
    run = with_example("plan", "two_layers:tiny", *twice)
    assert run.returncode == 2
    assert "which leaves halved biases: it needs biases as they were trained" in run.stderr
