"""Inputs that a pass takes away, all the way into engines and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import enginewright
from enginewright import pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.opened import open_subject
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.validation.inputs import draw


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dit:tiny`` for one class, heads pruned not at all: the second step must live without the input too."""
    out = tmp_path_factory.mktemp("fixed") / "out"
    recipe = make(
        {
            "model": "dit:tiny",
            "gates": ["fidelity.relative_l2 <= 1e-5"],
            "steps": [
                {"pass": "fix_inputs", "inputs": {"y": 2}},
                {"pass": "prune_heads", "share": 0.0, "importance": "taylor"},
            ],
            "targets": [{"target": "onnxruntime"}, {"target": "pytorch"}],
            "validation": {"rounds": 3, "calls": 2},
        }
    )
    _, code = pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    assert code == 0
    return out


def test_the_artifact_takes_what_is_left_and_was_compared_with_the_constant(fixed: Path) -> None:
    inputs = json.loads((fixed / "manifest.json").read_text())["interface"]["inputs"]
    assert [spec["name"] for spec in inputs] == ["x", "t"]
    report = record.read(fixed / "report.json")
    assert report.verdict == "met"
    assert report.steps[0].bytes.after < report.steps[0].bytes.before

    given = draw(sources.load("dit:tiny").inputs, seed=3)
    given["y"] = np.full_like(given["y"], 2)
    wanted = sources.load("dit:tiny").module(**{k: torch.from_numpy(v) for k, v in given.items()}).detach().numpy()
    for engine in (enginewright.load(fixed, "onnxruntime"), enginewright.load(fixed, "pytorch")):
        np.testing.assert_allclose(engine(x=given["x"], t=given["t"]), wanted, atol=1e-5)
        with pytest.raises(ToolchainError, match="has no input 'y'"):
            engine(**given)


def test_the_original_beside_opened_engines_has_the_constant_too(fixed: Path) -> None:
    opened = open_subject(str(fixed))
    assert [spec.name for spec in opened.inputs] == ["x", "t"]
    assert opened.original is not None
    given = draw(opened.inputs, seed=4)
    wanted = opened.original(given)["prediction_and_variance"]
    np.testing.assert_allclose(opened.runners["onnxruntime"](given)["prediction_and_variance"], wanted, atol=1e-5)
