from __future__ import annotations

from pathlib import Path

import pytest

import enginewright
from enginewright import catalog, pipeline
from enginewright.ground.errors import FaultsError, ToolchainError
from enginewright.progress import Progress
from enginewright.recipe import make, read, threads_here


def test_every_fault_is_found_at_once_with_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        """
schema = 1
model = "dit:digits"
sede = 3
gates = ["fidelity.cosin >= 0.9", "nonsense"]
[[steps]]
pass = "quantise_int8"
[[steps]]
pass = "quantize_int8"
percentile = 20
[[targets]]
target = "onnxruntime"
int8 = "sometimes"
"""
    )
    with pytest.raises(FaultsError) as caught:
        read(path)
    text = str(caught.value)
    assert "no setting 'sede'" in text
    assert "did you mean 'quantize_int8'" in text
    assert "bad.toml, steps[1].percentile" in text
    assert "percentile is 20" in text
    assert "bad.toml, targets[0].int8" in text
    assert "'sometimes'" in text
    assert len(caught.value.faults) >= 4


def test_bad_gates_are_quoted() -> None:
    with pytest.raises(ToolchainError, match="nonsense"):
        make({"model": "dit:digits", "gates": ["nonsense"]})
    with pytest.raises(ToolchainError, match=r"onnxruntim.*which the recipe lacks"):
        make({"model": "dit:digits", "gates": ["onnxruntim: latency.ratio <= 1"]})


def test_a_wrong_order_is_found_before_any_work() -> None:
    with pytest.raises(ToolchainError, match="quantize_int8 cannot come after quantize_int8"):
        make({"model": "dit:digits", "steps": [{"pass": "quantize_int8"}, {"pass": "quantize_int8"}]})


def test_a_target_may_stand_once() -> None:
    with pytest.raises(ToolchainError, match="'pytorch' stands twice"):
        make({"model": "dit:digits", "targets": [{"target": "pytorch"}, {"target": "pytorch"}]})


def test_a_target_may_stand_twice_under_two_names(tmp_path: Path) -> None:
    content = {
        "model": "dit:tiny",
        "gates": ["dynamic: fidelity.cosine >= 0.99", "onnxruntime: fidelity.cosine >= 0.99"],
        "steps": [{"pass": "quantize_int8"}],
        "targets": [{"target": "onnxruntime"}, {"target": "onnxruntime", "name": "dynamic", "int8": "dynamic"}],
        "validation": {"rounds": 3, "calls": 1},
    }
    report, _ = pipeline.export(make(content), tmp_path / "out", force=False, progress=Progress(quiet=True))
    assert [(target.name, target.kind) for target in report.targets] == [
        ("onnxruntime", "onnxruntime"),
        ("dynamic", "onnxruntime"),
    ]
    assert [gate.target for gate in report.gates] == ["dynamic", "onnxruntime"]
    assert {path.name for path in (tmp_path / "out" / "engines").iterdir()} == {"onnxruntime", "dynamic"}
    again = read(tmp_path / "out" / "recipe.toml")
    assert [step.name for step in again.targets] == ["onnxruntime", "dynamic"]
    assert enginewright.load(tmp_path / "out", "dynamic") is not None
    with pytest.raises(ToolchainError, match="it has letters, digits and underscores"):
        make({**content, "targets": [{"target": "onnxruntime", "name": "../dynamic"}]})


@pytest.mark.parametrize(("quota", "threads"), [(None, 64), (0.5, 1), (1.5, 2), (2.0, 2), (99.0, 64)])
def test_a_containers_quota_bounds_the_threads(
    quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginewright.targets.machine.core_quota", lambda: quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert threads_here() == threads


def test_not_toml_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("model = ")
    with pytest.raises(ToolchainError, match="not TOML"):
        read(tmp_path / "x.toml")
    with pytest.raises(ToolchainError, match="no recipe"):
        read(tmp_path / "y.toml")


def test_written_out_it_reads_the_same_with_every_default(tmp_path: Path) -> None:
    recipe = make(
        {
            "model": "dit:digits",
            "gates": ["latency.ratio <= 0.5"],
            "steps": [{"pass": "quantize_int8", "exclude": ["final_layer.*"]}],
            "targets": [{"target": "onnxruntime", "optional": True}],
            "validation": {"batch": {"batch": 4}},
        }
    )
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.as_toml({"onnxruntime": {"int8": "dynamic"}}))
    again = read(path)
    assert again.head == recipe.head
    assert again.steps == recipe.steps
    assert again.targets[0].optional
    assert again.targets[0].target.model_dump()["int8"] == "dynamic"
    assert 'observer = "max"' in path.read_text()


@pytest.mark.parametrize("name", catalog.entries("recipes"))
def test_every_recipe_that_ships_is_sound(name: str) -> None:
    assert read(catalog.recipe_path(name)).steps


def test_a_recipe_that_moves_still_finds_its_files(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    content = {"weights": "w.safetensors", "calibration": {"file": "in/c.safetensors"}}
    out = tmp_path / "a" / "out"
    out.mkdir(parents=True)
    for model, wanted in {
        "py:net.py:build": "py:../../net.py:build",
        "hf:checkpoint": "hf:../../checkpoint",
        "hf:owner/name": "hf:owner/name",  # on a hub: no such folder here
        "pt2:net.pt2": "pt2:../../net.pt2",
        "py:/there/net.py:build": "py:/there/net.py:build",
        "dit:S/2": "dit:S/2",
    }.items():
        recipe = make({"model": model, **content}, folder=tmp_path)
        moved = recipe.moved(out)
        assert moved.head.model == wanted
        assert moved.head.weights == "../../w.safetensors"
        assert moved.head.calibration.file == "../../in/c.safetensors"
        assert moved.moved(tmp_path).head == recipe.head
        assert moved.moved(tmp_path).model == recipe.model
    assert make({"model": "py:net.py:build"}, folder=tmp_path).model == f"py:{tmp_path}/net.py:build"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_graph_keeps_its_types_and_another_is_refused_in_words(dtype: str) -> None:
    with pytest.raises(ToolchainError, match="is an ONNX graph, which keeps the types it was written in"):
        make({"schema": 1, "model": "onnx:m.onnx?batch=1..8", "export": {"dtype": dtype}})
    assert make({"schema": 1, "model": "dit:tiny", "export": {"dtype": dtype}}).head.export.dtype == dtype
