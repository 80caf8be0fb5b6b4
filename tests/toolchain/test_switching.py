"""Artifacts of several engines: a network for each stretch of timesteps, all the way into engines and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import enginewright
from enginewright import pipeline
from enginewright.ground.signature import Arrays
from enginewright.opened import open_subject
from enginewright.passes.variants import REUSED, ByTimestep
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.switching import Switching, Table, switching, table_of
from enginewright.validation.inputs import draw


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sliced") / "out"
    recipe = make(
        {
            "model": "dit:tiny",
            "steps": [{"pass": "slice_width_by_timestep", "importance": "activation", "steps": 6, "buckets": 2}],
            "targets": [{"target": "onnxruntime"}, {"target": "pytorch"}],
            "validation": {"rounds": 3, "calls": 2},
            "calibration": {"calls": 2},
        }
    )
    _, code = pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    assert code == 0
    return out


def test_the_artifact_holds_an_engine_for_each_stretch(sliced: Path) -> None:
    table = json.loads((sliced / "engines.json").read_text())
    assert table["input"] == "t"
    assert table["timesteps"] == [999, 799, 599, 400, 200, 0]
    assert set(table["table"]) == {0, 1}
    files = json.loads((sliced / "manifest.json").read_text())["files"]
    assert {"engines.json", "model-0.onnx", "model-1.onnx"} <= files.keys()
    names = {f"{target}-{number}" for target in ("onnxruntime", "pytorch") for number in (0, 1)}
    assert {path.name for path in (sliced / "engines").iterdir()} == names
    step = record.read(sliced / "report.json").steps[0]
    assert step.macs.after < 0.75 * step.macs.before


def test_engines_and_module_agree_for_rows_of_any_timestep(sliced: Path) -> None:
    opened = open_subject(str(sliced))
    call = draw(opened.inputs, seed=5, sizes={"batch": 4})
    call["t"] = np.asarray([0, 999, 250, 700], np.float32)
    module = enginewright.load_module(sliced)
    assert isinstance(module, ByTimestep)
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(array) for name, array in call.items()}).numpy()
    for name in ("onnxruntime", "pytorch"):
        found = opened.runners[name](call)["prediction_and_variance"]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    engine = enginewright.load(sliced, "onnxruntime")
    np.testing.assert_allclose(engine(**call), wanted, atol=1e-5)


@pytest.fixture(scope="module")
def reused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reused") / "out"
    recipe = make(
        {
            "model": "dit:tiny",
            "steps": [{"pass": "reuse_blocks", "interval": 3, "steps": 4}],
            "targets": [{"target": "onnxruntime"}, {"target": "pytorch"}],
            "validation": {"rounds": 3, "calls": 2},
            "calibration": {"calls": 2},
        }
    )
    _, code = pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    assert code == 0
    return out


def test_engines_that_reuse_keep_the_signature_and_walk_as_the_module_does(reused: Path) -> None:
    table = json.loads((reused / "engines.json").read_text())
    assert (table["table"], table["reused"]) == ([0, 1, 1, 0], [16, 32])
    module = enginewright.load_module(reused)
    engines = [enginewright.load(reused, name) for name in ("onnxruntime", "pytorch")]
    assert [spec.name for spec in engines[0].inputs] == ["x", "t", "y"]
    call = {name: torch.from_numpy(array) for name, array in draw(engines[0].inputs, seed=5).items()}
    moved = []
    for t in table["timesteps"]:
        call["t"] = torch.full_like(call["t"], t)
        with torch.no_grad():
            wanted = module(**call)
            moved.append(not torch.equal(wanted, module.variants[0](**call)[0]))
        for engine in engines:
            torch.testing.assert_close(engine(**call), wanted, atol=1e-5, rtol=0)
    assert moved == [False, True, True, False]
    assert "reuse" in record.read(reused / "report.json").steps[0].notes[0]


def test_engines_reuse_only_what_a_call_of_the_same_shape_left() -> None:
    table = Table(input="t", timesteps=(10.0, 5.0), table=(0, 1), reused=(1,))

    def whole(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"], REUSED: 2 * inputs["x"]}

    def short(inputs: Arrays) -> Arrays:
        return {"y": inputs[REUSED]}

    both = switching([whole, short], table)

    def run(x: float, t: float, rows: int) -> list[float]:
        found = both({"x": np.full(rows, x), "t": np.full(rows, t)})
        assert found.keys() == {"y"}
        return list(found["y"])

    assert (run(1, 10, 2), run(7, 5, 2)) == ([1, 1], [2, 2])
    assert (run(3, 10, 2), run(7, 5, 1)) == ([3, 3], [7])
    assert (run(3, 10, 1), run(7, 5, 1)) == ([3], [6])


def test_rows_go_where_the_table_sends_them_and_come_back_in_order() -> None:
    table = Table(input="t", timesteps=(10.0, 5.0, 0.0), table=(0, 0, 1))
    seen: list[list[float]] = []

    def runner(sign: int) -> object:
        def run(inputs: Arrays) -> Arrays:
            seen.append(inputs["t"].tolist())
            return {"y": sign * inputs["x"]}

        return run

    both = Switching([runner(1), runner(-1)], table)  # type: ignore[list-item]
    found = both({"x": np.arange(4.0), "t": np.asarray([0.0, 9.0, 2.4, 2.6])})
    assert found["y"].tolist() == [0, 1, -2, 3]
    assert seen == [[9.0, 2.6], [0.0, 2.4]]
    assert both({"x": np.ones(1), "t": np.zeros(1)})["y"].tolist() == [-1]
    assert both.first_non_finite({}) == ""


def test_a_single_network_has_no_table() -> None:
    assert table_of(torch.nn.Linear(1, 1)) is None
