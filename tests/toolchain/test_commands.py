"""Commands in this process, on the shared artifact and on copies of it that something happened to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from enginewright import api, cli
from enginewright import artifact as artifacts
from enginewright.api import named_alike
from enginewright.ground.errors import MISSED, WRONG_USE, ToolchainError
from tests.reports.example import example_report


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def baseline(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert command(capsys, "check", artifact, "--baseline", tmp_path / "b.json", "--update")[0] == 0
    return tmp_path / "b.json"


def test_compare_and_export_give_the_same_figures_of_the_same_artifact(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((artifact / "report.json").read_text())
    code, out, _ = command(capsys, "compare", "dit:tiny", artifact, "--json")
    assert code == 0
    (found,) = json.loads(out)["runners"][0]["fidelity"]
    (wanted,) = report["targets"][0]["fidelity"]
    assert found["calls"] == report["validation"]["calls"] == 2
    for name in ("max_abs", "relative_l2", "cosine", "worst_column"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-3), name
    assert found["worst_call"] == wanted["worst_call"]
    code, out, _ = command(capsys, "compare", "dit:tiny", artifact, "--calls", 1)
    assert "1 call:" in out


def test_the_terminal_says_over_how_many_calls_and_which_was_the_worst(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = command(capsys, "compare", "dit:tiny", artifact)
    assert "worst of 2 calls, call " in out
    assert "worst of 2 calls, call " in (artifact / "report.md").read_text()
    assert "worst of 2 calls, call " in (artifact / "report.html").read_text()


def test_outputs_of_the_same_names_in_another_order_meet_by_name() -> None:
    one, two = np.zeros(2), np.ones(2)
    wanted = [{"a": one, "b": two}]
    assert named_alike(wanted, [{"b": two, "a": one}])[0]["a"] is one
    assert named_alike(wanted, [{"output_0": one, "output_1": two}])[0]["b"] is two


@pytest.mark.parametrize("what", ["cosine", "verdict", "ratio", "no number"])
def test_edited_figures_fail_a_check(copy: Path, baseline: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    report = json.loads((copy / "report.json").read_text())
    target = report["targets"][0]
    if what == "cosine":
        target["fidelity"][0]["cosine"] = 1.0
    elif what == "verdict":
        report["verdict"] = "missed"
    else:
        target["latency"]["ratio"] = 0.001 if what == "ratio" else float("nan")
    (copy / "report.json").write_text(json.dumps(report))
    for asked in (("check", copy, "--baseline", baseline), ("report", copy)):
        code, _, error = command(capsys, *asked)
        assert code == WRONG_USE
        assert "report.json was changed since the run" in error


def test_an_emptied_manifest_over_a_junk_engine_fails_a_check(
    copy: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = next(path for path in (copy / "engines").rglob("*") if path.is_file())
    engine.write_bytes(b"junk")
    manifest = json.loads((copy / "manifest.json").read_text())
    for files in (manifest["files"], {}, {"recipe.toml": manifest["files"]["recipe.toml"]}):
        (copy / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        code, _, error = command(capsys, "check", copy, "--baseline", baseline)
        assert code == WRONG_USE
        assert "damaged" in error


def test_a_baseline_without_figures_fails_a_check(
    artifact: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline.write_text(json.dumps(json.loads(baseline.read_text()) | {"figures": {}}))
    code, _, error = command(capsys, "check", artifact, "--baseline", baseline)
    assert code == WRONG_USE
    assert "holds no figures" in error


def test_an_update_says_which_times_it_left_out_and_why(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "check", artifact, "--baseline", tmp_path / "b.json", "--update")
    assert code == 0
    assert "left out onnxruntime/latency.ratio: 4 samples in 2 rounds are too few" in out
    assert "latency" not in json.dumps(list(json.loads((tmp_path / "b.json").read_text())["figures"]))


def test_a_figure_of_ones_own_is_held_too(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("check", artifact, "--baseline", tmp_path / "b.json")
    assert command(capsys, *asked, "--figure", "accuracy=0.91", "--update")[0] == 0
    assert command(capsys, *asked, "--figure", "accuracy=0.905")[0] == 0
    code, out, _ = command(capsys, *asked, "--figure", "accuracy=0.85")
    assert code == MISSED
    assert "given/accuracy" in out


def test_a_report_is_rendered_again_and_its_record_left_alone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (copy / "report.json").read_bytes()
    (copy / "report.html").write_text("gone")
    assert command(capsys, "report", copy)[0] == 0
    assert (copy / "report.json").read_bytes() == before
    assert (copy / "report.html").read_text() != "gone"


def test_a_whole_artifact_can_be_replaced_with_force(copy: Path) -> None:
    artifacts.refuse_existing(copy, force=True)
    (copy / "mine.txt").write_text("a user's own")
    with pytest.raises(ToolchainError, match=r"mine\.txt"):
        artifacts.refuse_existing(copy, force=True)


def test_a_bound_without_end_is_refused_before_any_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = command(
        capsys, "export", "dit:tiny", "--gate", "latency.ratio <= 1e999", "-o", tmp_path / "out", "--quiet"
    )
    assert code == WRONG_USE
    assert "would bound nothing" in error


RANDOM = """
import torch
from torch import nn

class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(nn.functional.dropout(self.first(x), 0.5))

def build():
    return Drawing(), {"x": torch.randn(8, 4)}
"""


def test_a_model_that_draws_random_numbers_is_refused_with_its_layer_and_a_way_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(RANDOM)
    place = tmp_path / "out"
    code, _, error = command(capsys, "export", f"py:{tmp_path / 'net.py'}:build", "-o", place, "--quiet")
    assert code == WRONG_USE
    assert "draws random numbers" in error
    assert "first seen in the output of layer last" in error
    assert "give it the noise as an input" in error
    assert not place.exists()


def test_bench_says_where_each_ran_and_gives_the_original_of_each_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = example_report().targets[0].latency
    assert timed is not None
    there = {"device": "cuda:0", "original_device": "cuda:0", "original_median_s": 0.002}
    between = {"device": "cuda:0", "unsafe": ["the ratio compares devices as well"]}
    found = {"here": timed, "there": timed.model_copy(update=there), "between": timed.model_copy(update=between)}
    monkeypatch.setattr(api, "bench", lambda *_, **__: api.Timing(threads=2, runners=found, not_measured={}))
    lines = command(capsys, "bench", "out", "--rounds", 24)[1].splitlines()
    assert lines[:2] == [
        "original on cpu: median 10.54 ms, 2 threads, 24 samples of each",
        "original on cuda:0: median 2.00 ms, 2 threads, 24 samples of each",
    ]
    said = {line.split()[0]: line for line in lines[3:6]}
    assert "on" not in said["here"].split()
    assert said["there"].endswith("(both on cuda:0, inputs on the device)")
    assert said["between"].endswith("inconclusive (the engine on cuda:0, inputs on the device; the original on cpu)")
    monkeypatch.setattr(api, "bench", lambda *_, **__: api.Timing(threads=2, runners={"here": timed}, not_measured={}))
    first = command(capsys, "bench", "out", "--rounds", 24)[1].splitlines()[0]
    assert first == "original: median 10.54 ms, 2 threads, 24 samples of each"
