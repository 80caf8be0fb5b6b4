"""The five methods' recipes all the way: engines equal PyTorch at declared sizes, with their inputs and without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from enginewright import catalog, pipeline
from enginewright.ground.signature import Arrays, Dim
from enginewright.opened import open_subject
from enginewright.progress import Progress
from enginewright.recipe import read
from enginewright.reports import record

INPUTS = {
    "alignedgen": {},
    "freecus": {"couple_bias": lambda rows: np.tile(np.where(np.arange(16) % 3, 0, -1e4), (rows, 1))},
    "attenst": {"couple_gate": lambda rows: np.arange(rows) % 2},
    "diffstyler": {"couple_rate": lambda rows: np.full(rows, 0.4), "couple_features": lambda rows: np.arange(rows) % 2},
    "stylesculptor": {},
}
"""Other than the defaults, for so many rows."""
STREAMS = {"alignedgen": 3, "freecus": 2, "attenst": 3, "diffstyler": 3, "stylesculptor": 4}
CASES = [name if name == "stylesculptor" else pytest.param(name, marks=pytest.mark.slow) for name in INPUTS]
"""Networks of diffusers take long to export."""


@pytest.fixture(scope="module", params=CASES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A method, and its recipe run without TensorRT."""
    recipe = read(catalog.recipe_path(f"{request.param}-tiny"))
    recipe = replace(recipe, targets=tuple(each for each in recipe.targets if not each.optional))
    out = tmp_path_factory.mktemp(request.param) / "out"
    _, code = pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    assert code == 0
    return request.param, out


def test_engines_equal_the_coupled_module_at_every_size(artifact: tuple[str, Path]) -> None:
    _, out = artifact
    report = record.read(out / "report.json")
    assert report.steps[0].changed
    for target in report.targets:
        assert not target.faults
        assert len(target.sizes) >= 2
        assert all(size.verdict == "met" for size in target.sizes)
        errors = [*(each.relative_l2 for each in target.fidelity), *(size.relative_l2 for size in target.sizes)]
        assert max(error for error in errors if error is not None) < 1e-4


def test_the_signature_takes_rows_in_multiples(artifact: tuple[str, Path]) -> None:
    name, out = artifact
    inputs = json.loads((out / "manifest.json").read_text())["interface"]["inputs"]
    rows = [spec["shape"][0] for spec in inputs]
    assert {(row["low"], row["multiple_of"]) for row in rows} == {(STREAMS[name], STREAMS[name])}
    assert {spec["name"] for spec in inputs if spec["default"] is not None} == set(INPUTS[name])


def test_an_engine_does_what_its_inputs_say(artifact: tuple[str, Path]) -> None:
    name, out = artifact
    opened = open_subject(str(out), trust_code=True)
    assert opened.model is not None
    assert opened.original is not None
    call: Arrays = opened.model.batches(1, 3)[0]
    rows = len(next(iter(call.values())))
    more = {key: make(rows).astype(np.float32) for key, make in INPUTS[name].items()}
    answers = []
    for each in (call, {**call, **more}):
        wanted, got = (next(iter(run(each).values())) for run in (opened.original, opened.runners["onnxruntime"]))
        assert np.abs(wanted - got).max() <= 1e-4 * np.abs(wanted).max()
        answers.append(got)
    if more:
        assert np.abs(answers[0] - answers[1]).max() > 1e-3 * np.abs(answers[0]).max()


def test_nothing_is_computed_in_float64(artifact: tuple[str, Path]) -> None:
    name, out = artifact
    model = onnx.load(out / "model.onnx", load_external_data=False)
    double = onnx.TensorProto.DOUBLE
    assert not [each.name for each in model.graph.initializer if each.data_type == double]
    assert not [each.name for each in model.graph.value_info if each.type.tensor_type.elem_type == double]
    casts = [a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"]
    assert double not in casts
    assert name in INPUTS


def test_a_dimension_of_rows_says_which_sizes_it_takes() -> None:
    rows = Dim(name="batch", low=3, typical=3, high=63, multiple_of=3)
    assert rows.fault_of(6) == ""
    assert rows.fault_of(4) == "batch is 4; the model takes multiples of 3 from 3 to 63"


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_tensorrt_rtx_builds_every_method(name: str, tmp_path: Path) -> None:
    recipe = read(catalog.recipe_path(f"{name}-tiny"))
    recipe = replace(recipe, targets=tuple(each for each in recipe.targets if each.optional))
    report, _ = pipeline.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    (target,) = report.targets
    if not target.buildable:
        pytest.skip(target.reason)
    assert target.built, target.reason
