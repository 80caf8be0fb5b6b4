"""Adapters that are inputs, all the way into engines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import enginewright
from enginewright import adapters, pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Arrays
from enginewright.opened import open_subject
from enginewright.passes.contract import Context, Plan
from enginewright.passes.specialize.adapters_as_inputs import AdaptersAsInputs
from enginewright.passes.specialize.fold_adapters import FoldAdapters
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.validation.inputs import draw

LAYERS = {"blocks.0.attn.qkv": (32, 96), "blocks.1.mlp.fc2": (128, 32)}


def adapter(path: Path, seed: int, rank: int = 2) -> Path:
    """A file of kohya's names."""
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (reads, writes) in LAYERS.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, reads, generator=noise) / 4
        tensors[f"{name}.lora_up.weight"] = torch.randn(writes, rank, generator=noise) / 4
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and ``dit:tiny`` with adapters as inputs."""
    folder = tmp_path_factory.mktemp("adapters")
    adapter(folder / "a.safetensors", 1)
    adapter(folder / "b.safetensors", 2, rank=3)
    recipe = make(
        {
            "model": "dit:tiny",
            "gates": ["fidelity.relative_l2 <= 1e-5"],
            "steps": [{"pass": "adapters_as_inputs", "files": ["a.safetensors", "b.safetensors"]}],
            "targets": [{"target": "onnxruntime"}, {"target": "pytorch"}],
            "validation": {"rounds": 3, "calls": 2},
        },
        folder=folder,
    )
    _, code = pipeline.export(recipe, folder / "out", force=False, progress=Progress(quiet=True))
    assert code == 0
    return folder


def call(rows: int) -> Arrays:
    return draw(sources.load("dit:tiny").inputs, seed=3, sizes={"batch": rows})


def folded(folder: Path, file: str, rows: int, scale: float) -> np.ndarray:
    module = sources.load("dit:tiny").module
    module = FoldAdapters(file=file, scale=scale).apply(module, Context(folder=folder)).model
    with torch.no_grad():
        found: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in call(rows).items()}).numpy()
    return found


@pytest.mark.parametrize("target", ["onnxruntime", "pytorch"])
def test_an_engine_is_switched_from_adapter_to_adapter_and_back(target: str, folder: Path) -> None:
    engine = enginewright.load(folder / "out", target)
    a = enginewright.adapter_inputs(folder / "out", folder / "a.safetensors", scale=0.5)
    b = enginewright.adapter_inputs(folder / "out", folder / "b.safetensors")
    assert {name: array.shape for name, array in a.items()} == {
        "adapter_down_32": (1, 3, 32),
        "adapter_down_128": (1, 3, 128),
        "adapter_up_32": (1, 32, 3),
        "adapter_up_96": (1, 96, 3),
    }
    first, other, again = (engine(**call(3), **each) for each in (a, b, a))
    assert np.array_equal(first, again)
    np.testing.assert_allclose(first, folded(folder, "a.safetensors", 3, 0.5), atol=1e-5)
    np.testing.assert_allclose(other, folded(folder, "b.safetensors", 3, 1.0), atol=1e-5)
    assert np.abs(first - other).max() > 1e-2
    with torch.no_grad():
        given = {name: torch.from_numpy(array) for name, array in call(2).items()}
        base = sources.load("dit:tiny").module(**given).numpy()
    np.testing.assert_allclose(engine(**call(2)), base, atol=1e-6)


def test_the_artifact_says_what_they_are_and_was_compared_with_adapters(folder: Path) -> None:
    interface = json.loads((folder / "out" / "manifest.json").read_text())["interface"]
    inputs = {spec["name"]: spec for spec in interface["inputs"]}
    assert [inputs[name]["role"] for name in inputs] == ["sample", "timestep", "condition", *["adapter"] * 4]
    assert [inputs[name]["drawn"] for name in inputs] == [False] * 3 + [True] * 4
    report = record.read(folder / "out" / "report.json")
    assert report.verdict == "met"
    assert "which is not fusable: they add" in report.steps[0].notes[0]
    to_original = report.targets[0].fidelity_to_original[0].relative_l2
    assert to_original < 1e-5, "without adapters it is the base"
    opened = open_subject(str(folder / "out"))
    assert opened.original is not None
    assert opened.model is not None
    drawn = opened.model.held_out(2, 5)[0]
    assert drawn["adapter_up_96"].any()
    plain = {name: array for name, array in drawn.items() if not name.startswith("adapter")}
    moved, base = (opened.original(each)["prediction_and_variance"] for each in (drawn, plain))
    assert np.abs(moved - base).max() > 1e-3, "what engines are held against has them too"


def test_guided_rows_share_the_adapter(folder: Path) -> None:
    steps = [{"pass": "adapters_as_inputs", "files": ["a.safetensors"]}, {"pass": "merge_guidance", "none": 4}]
    run = pipeline.Run(make({"model": "dit:tiny", "steps": steps}, folder=folder), Progress(quiet=True))
    module = run.optimize()
    shared = {name for name in (spec.name for spec in run.exported.inputs) if name.startswith("adapter")}
    assert set(run.results[1][1].plan.choice[""].shared) == shared
    given = run.example(run.exported, batch=3)
    assert all(given[name].any() for name in shared)
    with torch.no_grad():
        found, wanted = module(**given), run.intended.module(**given)
        plain = module(**{name: tensor for name, tensor in given.items() if name not in shared})
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (found - plain).abs().max() > 1e-3


def test_an_artifact_without_such_inputs_takes_no_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_strength = AdaptersAsInputs(files=("a.safetensors",), inputs="strength")
    for steps, said in (([], "take no adapters"), ([(by_strength, Plan(choice={}))], "their strength is the input")):
        monkeypatch.setattr(adapters, "recorded", lambda run, folder, steps=steps: steps)
        with pytest.raises(ToolchainError, match=re.escape(said)) as caught:
            enginewright.adapter_inputs(folder / "out", folder / "a.safetensors")
        assert caught.value.help == "export the model with the pass adapters_as_inputs"
