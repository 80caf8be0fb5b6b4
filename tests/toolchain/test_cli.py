"""What a user types, and what it says back; each in a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "dti:digits"], "did you mean 'dit'"),
        (["export", "dit:digits", "--pass", "quantise_int8"], "did you mean 'quantize_int8'"),
        (["export", "dit:digits", "--target", "onxruntime"], "did you mean 'onnxruntime'"),
        (["export", "dit:tiny", "--pass", "prune_heads:share=1.5"], "share is 1.5"),
        (["export", "dit:tiny", "--pass", "prune_heads:shape=0.5"], "no setting 'shape'"),
        (["export", "dit:tiny", "--pass", "prune_heads:half"], "'half' is not key=value"),
        (["export", "dit:tiny", "--gate", "speed <= 1"], "speed"),
        (["run", "nowhere.toml"], "no recipe 'nowhere.toml'"),
        (["run", "dit-digits-int"], "did you mean 'dit-digits-int8'"),
        (["show", "quantiseint8"], "did you mean 'quantize_int8'"),
        (["check", "nowhere", "--baseline", "b.json"], "no artifact"),
        (["report", "nowhere"], "no report"),
        (["bench", "dit:tiny"], "nothing to time it against"),
    ],
)
def test_wrong_use_ends_in_2_with_one_clear_error(enginewright: Cli, arguments: list[str], said: str) -> None:
    run = enginewright(*arguments)
    assert run.returncode == 2
    assert said in run.stderr
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr


def test_errors_are_json_too_when_asked(enginewright: Cli) -> None:
    run = enginewright("show", "nonsense_name", "--json")
    assert json.loads(run.stdout)["errors"][0]["message"] == "there is no entry named 'nonsense_name'"


def test_lists_are_arrays_of_names_and_summaries(enginewright: Cli) -> None:
    for kind in ("models", "passes", "targets", "metrics", "recipes"):
        found = json.loads(enginewright("list", kind, "--json").stdout)
        assert found
        assert all(entry.keys() == {"name", "summary"} for entry in found)


def test_show_gives_the_fields_that_others_rely_on(enginewright: Cli) -> None:
    found = json.loads(enginewright("show", "dit:S/2", "--json").stdout)
    assert {"name", "parameter_count", "macs", "inputs", "published"} <= found.keys()
    assert found["inputs"][0]["shape"] == ["batch", 4, 32, 32]
    assert found["published"][0].keys() == {"figure", "value", "source"}
    told = enginewright("show", "prune_heads").stdout
    assert "share: float, >= 0 < 1, default 0.25" in told
    assert "arXiv:1905.10650" in told


def test_doctor_gives_four_answers_for_every_target(enginewright: Cli) -> None:
    found = json.loads(enginewright("doctor", "--json").stdout)
    names = {"aot_inductor", "onnxruntime", "python_program", "pytorch", "tensorrt", "tensorrt_rtx"}
    assert {t["name"] for t in found["targets"]} == names
    for target in found["targets"]:
        answers = [target[key] for key in ("installed", "importable", "buildable", "runnable")]
        assert all(answers) or target["reason"]


def test_plan_writes_nothing(enginewright: Cli, tmp_path: Path) -> None:
    run = enginewright("plan", "dit:tiny", "--pass", "prune_heads:share=0.5", "--pass", "quantize_int8", "--json")
    assert run.returncode == 0, run.stderr
    steps = json.loads(run.stdout)
    assert [step["name"] for step in steps] == ["prune_heads", "quantize_int8"]
    assert steps[0]["plan"]["choice"]["blocks.0.attn"]["of"] == 4
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_compared_benched_checked_and_rendered(
    enginewright: Cli, artifact: Path, tmp_path: Path
) -> None:
    same = enginewright("compare", f"{artifact}#onnxruntime", artifact, "--gate", "fidelity.relative_l2 <= 0", "--json")
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout)["runners"][0]["fidelity"][0]["max_abs"] == 0
    other = enginewright("compare", "dit:tiny", artifact, "--gate", "fidelity.relative_l2 <= 0.0001")
    assert other.returncode == 1
    assert "missed" in other.stdout

    bench = enginewright("bench", artifact, "--rounds", 4, "--size", "batch=3", "--json")
    assert bench.returncode == 0, bench.stderr
    timed = json.loads(bench.stdout)["runners"]["onnxruntime"]
    assert timed["shapes"]["x"][0] == 3
    assert len(timed["samples_s"]) == 4
    assert "batch is 99" in enginewright("bench", artifact, "--size", "batch=99").stderr

    baseline = tmp_path / "baseline.json"
    assert "missing" in enginewright("check", artifact, "--baseline", baseline).stderr or not baseline.exists()
    assert enginewright("check", artifact, "--baseline", baseline, "--update").returncode == 0
    good = enginewright("check", artifact, "--baseline", baseline, "--junit", "j.xml")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "nothing regressed" in good.stdout
    assert "testsuite" in (tmp_path / "j.xml").read_text()
    content = json.loads(baseline.read_text())
    key = next(k for k in content["figures"] if "relative_l2" in k)
    content["figures"][key]["value"] /= 10
    baseline.write_text(json.dumps(content))
    bad = enginewright("check", artifact, "--baseline", baseline)
    assert bad.returncode == 1
    assert "regressed" in bad.stdout


def test_report_renders_again_from_the_record(enginewright: Cli, artifact: Path) -> None:
    before = (artifact / "report.html").read_text()
    (artifact / "report.html").write_text("gone")
    assert enginewright("report", artifact).returncode == 0
    assert (artifact / "report.html").read_text() == before


def test_an_existing_folder_is_refused_before_any_work(enginewright: Cli, artifact: Path) -> None:
    run = enginewright("export", "dit:tiny", "-o", artifact)
    assert run.returncode == 2
    assert "--force" in run.stderr
    assert "load" not in run.stderr
