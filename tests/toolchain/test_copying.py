"""A folder that can be copied: by default an artifact shares no file with what it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

import enginewright
from enginewright import artifact, pipeline, sources
from enginewright.arguments import weights_from
from enginewright.ground.errors import ToolchainError
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record


def export(folder: Path, name: str = "out", **more: Any) -> Path:
    """``dit:tiny`` in 8 bits over a file of weights, which holds more than the model."""
    source = folder / "w.safetensors"
    if not source.exists():
        save_file(sources.load("dit:tiny", seed=3).module.state_dict(), source)
    content = {
        "model": "dit:tiny",
        "weights": str(source),
        "steps": [{"pass": "quantize_int8"}],
        "targets": [{"target": "onnxruntime", "int8": "dynamic"}],
        "validation": {"skip": True},
        **more,
    }
    pipeline.export(make(content, folder=folder), folder / name, force=False, progress=Progress(quiet=True))
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("made"))


def graphs(out: Path) -> list[Path]:
    return sorted(out.rglob("*.onnx"))


def answer(out: Path) -> np.ndarray[Any, Any]:
    """What the artifact's engine gives, which needs no source."""
    x = sources.load("dit:tiny").batches(1, 0)[0]
    (found,) = enginewright.load(out).runner(x).values()
    return found


def test_every_graph_passes_the_checker_on_its_path_and_no_file_has_two_names(made: Path) -> None:
    assert [path.name for path in graphs(made)] == ["dynamic.onnx", "model.onnx"]
    for path in graphs(made):
        onnx.checker.check_model(path)
    assert {path.stat().st_nlink for path in made.rglob("*") if path.is_file()} == {1}


def test_an_artifact_is_accepted_as_a_model(made: Path) -> None:
    assert sources.load(f"onnx:{made / 'model.onnx'}").module is not None


def test_an_artifact_survives_a_copy_and_a_checkpoint_that_is_saved_over_in_place(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made.parent, tmp_path / "all")
    out, source = tmp_path / "all" / "out", tmp_path / "all" / "w.safetensors"
    before = answer(out)
    raw = bytearray(source.read_bytes())
    raw[-4000:] = bytes(4000)
    source.write_bytes(raw)
    artifact.read_manifest(out)
    shutil.copytree(out, tmp_path / "copy")
    np.testing.assert_array_equal(answer(tmp_path / "copy"), before)


def test_an_engine_s_folder_holds_what_it_reads_and_its_size_is_what_must_be_copied(made: Path) -> None:
    engine = made / "engines" / "onnxruntime"
    files = [path for path in engine.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["dynamic.onnx", "dynamic.safetensors", "engine.json"]
    (target,) = record.read(made / "report.json").targets
    assert target.bytes == sum(path.stat().st_size for path in files)
    quantized = {name for name, t in load_file(engine / "dynamic.safetensors").items() if t.dtype.itemsize == 1}
    whole = load_file(made / "weights" / "w.safetensors")
    assert quantized
    assert not {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} & whole.keys()


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose weights are links, without steps: its engine is its own graph."""
    return export(tmp_path_factory.mktemp("linked"), steps=[], export={"weights": "link"})


def test_an_engine_that_is_the_artifact_s_own_graph_counts_it_with_its_weights(linked: Path) -> None:
    (target,) = record.read(linked / "report.json").targets
    names = ["model.onnx", "weights/w.safetensors"]
    names += ["model.safetensors"] if (linked / "model.safetensors").exists() else []
    assert target.bytes == sum((linked / name).stat().st_size for name in names)


def test_linked_weights_are_said_on_the_page_and_in_the_terminal(linked: Path) -> None:
    assert (linked / "weights" / "w.safetensors").samefile(linked.parent / "w.safetensors")
    for name in ("report.html", "report.md"):
        assert "of weights are linked, not copied" in (linked / name).read_text()
    assert record.read(linked / "report.json").notes
    assert np.isfinite(answer(linked)).all()
    assert 'weights = "link"' in (linked / "recipe.toml").read_text()


def test_a_linked_artifact_is_accepted_as_a_model_and_exported_again(linked: Path, tmp_path: Path) -> None:
    content = {
        "model": f"onnx:{linked / 'model.onnx'}",
        "targets": [{"target": "onnxruntime"}],
        "validation": {"skip": True},
    }
    recipe = make(content, folder=tmp_path)
    pipeline.export(recipe, tmp_path / "again", force=False, progress=Progress(quiet=True))
    for path in graphs(tmp_path / "again"):
        onnx.checker.check_model(path)
    assert {path.stat().st_nlink for path in (tmp_path / "again").rglob("*") if path.is_file()} == {1}


@pytest.mark.slow
def test_several_networks_share_one_copy_of_their_weights(tmp_path: Path) -> None:
    steps = [{"pass": "slice_width_by_timestep", "share": 0.5}]
    out = export(tmp_path, steps=steps, targets=[])
    assert len(graphs(out)) > 1
    for path in graphs(out):
        onnx.checker.check_model(path)
    assert [path.name for path in (out / "weights").iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("given", "mode", "file"),
    [
        ([], None, None),
        (["copy"], "copy", None),
        (["w.safetensors"], None, "w.safetensors"),
        (["w.safetensors", "link"], "link", "w.safetensors"),
        (["./copy", "copy"], "copy", "./copy"),
    ],
)
def test_weights_takes_a_file_and_what_becomes_of_it(given: list[str], mode: str | None, file: str | None) -> None:
    assert weights_from(given) == (mode, file)


def test_two_files_of_weights_are_one_clear_error() -> None:
    with pytest.raises(ToolchainError, match="--weights was given twice: 'a' and 'b'"):
        weights_from(["a", "b"])
    with pytest.raises(ToolchainError, match="--weights was given twice: 'copy' and 'link'"):
        weights_from(["copy", "link"])
