"""Every pass on every small model: no traceback, no silent nothing, and engines equal to PyTorch at two sizes.

Run with ``make test-all``; the default suite leaves it out.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from enginewright import catalog, pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.passes.networks import networks_of, program_of
from enginewright.programs import called_as, graph_of
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.targets.pytorch_engine import flat
from enginewright.validation.inputs import draw
from tests.matrix.cells import settings_of, step_for
from tests.matrix.models import NAMES, written

pytestmark = pytest.mark.matrix

PASSES = tuple(catalog.entries("passes"))

INEXACT = {
    **dict.fromkeys(("convert_dtype", "quantize_fp8", "quantize_int8", "quantize_svd", "search_precision"), 5e-2),
    "quantize_weights": 2e-2,
}
"""Relative errors allowed where an engine computes in another form than PyTorch: half precision rounds elsewhere,
4-bit products may round activations, 8-bit ones may take dynamic scales, and a value at the border of two 8-bit
numbers falls on either side. All others must equal to 1e-4."""

WIDE = {("convert_dtype", "flux"): 0.3}
"""The same of single cells. Flux multiplies its timestep and guidance by 1000, where numbers in half precision are 0.5
to 2 apart, and takes sines of that; an engine on a CPU computes it in fp32."""


def tolerance(name: str, model: str) -> float:
    """The relative error allowed for a pass on a model."""
    return WIDE.get((name, model), INEXACT.get(name, 1e-4))


EXPORTED_SETTING = {"convert_dtype": 0}
"""Which of a pass's settings is exported; the last, but ONNX Runtime has no bfloat16 convolutions on a CPU."""

SCORE = '''
import torch


def closeness(module):
    """Less is worse: how large the weights are that are left."""
    return float(sum(parameter.abs().sum() for parameter in module.parameters()))
'''


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the models of this worker."""
    return tmp_path_factory.mktemp("matrix")


def run_of(text: str, name: str, settings: dict[str, Any], folder: Path) -> pipeline.Run:
    """A run of one step, ready to optimize."""
    (folder / "score.py").write_text(SCORE)
    model = sources.load(text)
    step = step_for(name, settings, model, text, folder)
    recipe = make(
        {
            "model": text,
            "steps": [{"pass": name, **step.model_dump(mode="json", exclude_none=True)}],
            "calibration": {"calls": 4},
            "validation": {"threads": 1, "calls": 2},
        },
        folder=folder,
    )
    return pipeline.Run(recipe, Progress(quiet=True))


def call(module: nn.Module, arrays: dict[str, Any]) -> list[np.ndarray]:
    """A module's outputs on arrays, in order."""
    with torch.no_grad():
        return [each.numpy() for each in flat(module(**{k: torch.from_numpy(v) for k, v in arrays.items()}))]


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2 error."""
    scale = float(np.linalg.norm(wanted.astype(np.float64))) or 1.0
    return float(np.linalg.norm(got.astype(np.float64) - wanted.astype(np.float64))) / scale


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_changes_something_or_says_why_not(name: str, model: str, shelf: Path, tmp_path: Path) -> None:
    text = written(model, shelf)
    for settings in settings_of(name):
        try:
            run = run_of(text, name, dict(settings), tmp_path)
            module = run.optimize()
        except ToolchainError:
            continue  # said in words, which is an answer
        plan = run.results[0][1].plan
        assert plan.choice or plan.skipped or plan.facts.notes, f"{settings}: did nothing, and gave no reason"
        assert all(len(reason) > 5 for reason in plan.skipped.values())
        model_now = run.exported
        for outputs in (call(module, arrays) for arrays in model_now.batches(1, 5)):
            assert all(np.isfinite(each).all() for each in outputs if each.dtype.kind == "f")


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("name", PASSES)
def test_a_changed_model_is_exported_equal_at_two_sizes(name: str, model: str, shelf: Path, tmp_path: Path) -> None:
    text = written(model, shelf)
    settings = dict(settings_of(name)[EXPORTED_SETTING.get(name, -1)])
    out = tmp_path / "out"
    try:
        run = run_of(text, name, settings, tmp_path)
        module = run.optimize()
        if not run.results[0][1].changed:
            return
        out.mkdir()
        program = program_of(module)
        for part, network in networks_of(module).items():
            pipeline.write_graph(run, called_as(program, part, run.exported), network, graph_of(out, part))
    except ToolchainError:
        return  # said in words; the other test asks that nothing else is raised
    for part, network in networks_of(module).items():
        called, path = called_as(program, part, run.exported), graph_of(out, part)
        for number, sizes in enumerate(two_sizes(called)):
            arrays = draw(called.inputs, seed=11 + number, sizes=sizes)
            wanted = call(network, arrays)
            for got, want in zip(raw(path, arrays), wanted, strict=True):
                assert got.shape == want.shape, f"{part} at {sizes}"
                assert distance(got, want) <= tolerance(name, model), f"{part} at {sizes}"
    shutil.rmtree(out)


def two_sizes(model: Any) -> list[dict[str, int]]:
    """The smallest sizes of all dynamic dimensions, and odd ones above them, which are none that it was traced at."""
    dims = {d.name: d for spec in model.inputs for d in spec.shape if not isinstance(d, int)}
    odd = {name: min(d.high, d.low + 3 * d.multiple_of) for name, d in dims.items()}
    return [{name: d.low for name, d in dims.items()}, odd]


def raw(path: Path, arrays: dict[str, Any]) -> list[np.ndarray]:
    """The graph's outputs, computed as written: no optimizer."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    return [np.asarray(each) for each in session.run(None, {k: v for k, v in arrays.items() if k in known})]
