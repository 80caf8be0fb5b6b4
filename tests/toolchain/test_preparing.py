"""Artifacts of two engines in a row: what a run needs once, and its steps, all the way into engines and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import enginewright
from enginewright import pipeline
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Arrays
from enginewright.opened import open_subject
from enginewright.passes.hoisting import hoisted
from enginewright.preparing import Preparing, said_of
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.targets.split_graph import Halves
from enginewright.validation.inputs import draw


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parted") / "out"
    recipe = make(
        {
            "model": "dit:tiny",
            "steps": [{"pass": "hoist_constants", "constant": ["t"]}],
            "gates": ["fidelity.max_abs <= 1e-5"],
            "targets": [{"target": "onnxruntime"}, {"target": "pytorch"}],
            "validation": {"rounds": 3, "calls": 2},
            "calibration": {"calls": 2},
        }
    )
    _, code = pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    assert code == 0
    return out


def test_the_artifact_holds_two_engines_and_says_how_they_are_called(parted: Path) -> None:
    halves = json.loads((parted / "prepared.json").read_text())
    assert halves["prepare"] == ["t"]
    assert halves["step"] == ["x", "y"]
    files = json.loads((parted / "manifest.json").read_text())["files"]
    assert {"prepared.json", "model-prepare.onnx", "model-step.onnx", "model.safetensors"} <= files.keys()
    assert "model.onnx" not in files
    names = {"onnxruntime-prepare", "onnxruntime-step", "pytorch-step"}
    assert {path.name for path in (parted / "engines").iterdir()} == names


def test_the_report_tells_steps_from_preparing(parted: Path) -> None:
    report = record.read(parted / "report.json")
    (step,) = report.steps
    assert step.macs.before - step.macs.after == 256 * 32 + 32 * 32  # the two layers of t_embedder, for one row
    assert "needed once for a run of constant t" in step.notes[0]
    notes = {target.name: target.notes for target in report.targets}
    assert any("latency is of a step; preparing a run took" in note for note in notes["onnxruntime"])
    assert not any("preparing" in note for note in notes["pytorch"])
    assert all(target.latency for target in report.targets)


def test_engines_and_module_agree_at_any_batch(parted: Path) -> None:
    opened = open_subject(str(parted))
    module = enginewright.load_module(parted)
    assert hoisted(module) is not None
    engine = enginewright.load(parted, "onnxruntime")
    for rows in (1, 4):
        call = draw(opened.inputs, seed=rows, sizes={"batch": rows})
        with torch.no_grad():
            wanted = module(**{name: torch.from_numpy(array) for name, array in call.items()}).numpy()
        for name in ("onnxruntime", "pytorch"):
            np.testing.assert_allclose(opened.runners[name](call)["prediction_and_variance"], wanted, atol=1e-5)
        np.testing.assert_allclose(engine(**call), wanted, atol=1e-5)


def test_preparing_runs_when_a_constant_changes_and_not_else() -> None:
    seen: list[list[float]] = []

    def prepare(inputs: Arrays) -> Arrays:
        assert inputs.keys() == {"c"}
        seen.append(inputs["c"].tolist())
        return {"k": 2 * inputs["c"]}

    def step(inputs: Arrays) -> Arrays:
        assert inputs.keys() == {"x", "k"}
        return {"y": inputs["x"] + inputs["k"]}

    both = Preparing(prepare, step, Halves(prepare=("c",), step=("x",), passed=("k",)))
    assert said_of(both) == []
    c = np.ones(2)
    for x in (1.0, 2.0):
        assert both({"x": np.full(2, x), "c": c})["y"].tolist() == [x + 2, x + 2]
    assert seen == [[1, 1]]
    assert both({"x": np.zeros(2), "c": np.ones(2)})["y"].tolist() == [2, 2]
    assert seen == [[1, 1]], "equal content is no change"
    c[0] = 5
    assert both({"x": np.zeros(2), "c": c})["y"].tolist() == [10, 2]
    assert seen == [[1, 1], [5, 1]], "written into in place"
    assert both({"x": np.zeros(1), "c": np.ones(1)})["y"].tolist() == [2]
    assert len(seen) == 3
    assert both.first_non_finite({"x": c, "c": c}) == ""
    assert said_of(both)[0].endswith("(median of 3)")


def test_a_recipe_says_that_networks_by_timestep_cannot_be_parted_after() -> None:
    with pytest.raises(ToolchainError, match="hoist_constants"):
        make(
            {
                "model": "dit:tiny",
                "steps": [{"pass": "slice_width_by_timestep"}, {"pass": "hoist_constants", "constant": ["y"]}],
                "targets": [{"target": "pytorch"}],
            }
        )


def test_a_checkpoint_on_disk_is_parted_around_its_linked_weights(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "bert")
    recipe = make(
        {
            "model": f"hf:{tmp_path / 'bert'}",
            "steps": [{"pass": "hoist_constants", "constant": ["token_type_ids"]}],
            "targets": [{"target": "onnxruntime"}],
            "validation": {"skip": True},
            "calibration": {"calls": 1},
        }
    )
    out = tmp_path / "out"
    pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    assert (out / "model-prepare.onnx").exists()
    assert list((out / "weights").iterdir()), "the weights lie where they lay"
    engine, module = enginewright.load(out), enginewright.load_module(out)
    call = draw(engine.inputs, seed=3, sizes={"batch": 3})
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(array) for name, array in call.items()})[0].numpy()
    np.testing.assert_allclose(engine(**call)[0], wanted, atol=1e-5)
