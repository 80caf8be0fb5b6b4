"""Sources that have moved: taken where they are now when they are the same, refused when they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

import enginewright
from enginewright import artifact, origin, pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.opened import open_subject
from enginewright.progress import Progress
from enginewright.recipe import make
from tests import graphs

NET = """
from torch import nn
import torch
from .part import WIDTH

def build():
    return nn.Sequential(nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)), (torch.zeros(2, 8),)
"""


def export(model: str, out: Path, **more: Any) -> None:
    targets = [{"target": "onnxruntime"}]
    recipe = make({"model": model, "targets": targets, "validation": {"skip": True}, **more})
    pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))


@pytest.fixture
def user_file(tmp_path: Path) -> tuple[Path, Path]:
    """A file with a neighbour, and an artifact of it."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "net.py").write_text(NET)
    (tmp_path / "old" / "part.py").write_text("WIDTH = 16\n")
    export(f"py:{tmp_path / 'old' / 'net.py'}:build", tmp_path / "out")
    return tmp_path / "old", tmp_path / "out"


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())["source"]
    return found


def test_a_moved_source_is_named_with_its_digest_and_taken_where_it_is(user_file: tuple[Path, Path]) -> None:
    old, out = user_file
    before = enginewright.load_module(out, trust_code=True)
    moved = old.rename(old.parent / "new")
    with pytest.raises(ToolchainError, match="not where it was") as caught:
        enginewright.load_module(out, trust_code=True)
    assert caught.value.where == str(old / "net.py")
    assert record(out)["files"]["."]["sha256"] in str(caught.value.help)
    assert "--source PATH" in str(caught.value.help)
    after = enginewright.load_module(out, source=moved / "net.py", trust_code=True)
    assert all(map(torch.equal, before.parameters(), after.parameters()))


def test_a_source_that_is_another_is_refused_wherever_it_lies(user_file: tuple[Path, Path]) -> None:
    old, out = user_file
    moved = old.rename(old.parent / "new")
    with pytest.raises(ToolchainError, match=r"not what the artifact was made from: absent\.py is missing"):
        enginewright.load_module(out, source=moved / "absent.py", trust_code=True)
    size = (moved / "part.py").stat().st_size
    (moved / "part.py").write_text("WIDTH = 160\n")
    with pytest.raises(ToolchainError, match=f"part.py has {size + 1} bytes, not {size}"):
        enginewright.load_module(out, source=moved / "net.py", trust_code=True)
    (moved / "part.py").write_text("WIDTH = 17\n")
    with pytest.raises(ToolchainError, match=r"part\.py has another SHA-256"):
        enginewright.load_module(out, source=moved / "net.py", trust_code=True)
    moved.rename(old)
    with pytest.raises(ToolchainError, match=r"part\.py has another SHA-256") as caught:
        enginewright.load_module(out, trust_code=True)  # a file that was changed where it lies is no better
    assert record(out)["files"]["."]["sha256"] in str(caught.value.help)


def test_engines_run_without_their_source(user_file: tuple[Path, Path]) -> None:
    old, out = user_file
    shutil.rmtree(old)
    assert enginewright.load(out)(torch.zeros(3, 8)).shape == (3, 4)


def test_an_artifact_that_records_nothing_opens_as_before_but_takes_no_other_source(
    user_file: tuple[Path, Path],
) -> None:
    old, out = user_file
    content = artifact.read_manifest(out)
    del content["source"]
    (out / "manifest.json").write_text(json.dumps(content))
    assert enginewright.load_module(out, trust_code=True) is not None
    with pytest.raises(ToolchainError, match="records no files of its source"):
        enginewright.load_module(out, source=old / "net.py", trust_code=True)


def test_bench_and_compare_take_the_new_place(
    user_file: tuple[Path, Path], enginewright: Callable[..., CompletedProcess[str]]
) -> None:
    old, out = user_file
    moved = old.rename(old.parent / "new") / "net.py"
    lost = enginewright("bench", out, "--rounds", 3)
    assert lost.returncode == 2
    assert str(old / "net.py") in lost.stderr
    assert "--source PATH" in lost.stderr
    found = enginewright("bench", out, "--rounds", 3, "--source", moved, "--trust-code", "--json")
    assert found.returncode == 0, found.stderr
    assert "onnxruntime" in json.loads(found.stdout)["runners"]
    places = ("--source", moved.parent / "part.py", "--source", moved)
    same = enginewright("compare", f"py:{moved}:build", out, *places, "--trust-code")
    assert same.returncode == 0, same.stderr


def test_every_source_tells_its_files(tmp_path: Path) -> None:
    path = graphs.mixed(tmp_path / "plain.onnx")
    model = onnx.load(path)
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.bin", size_threshold=0)
    assert sorted(sources.load(f"onnx:{tmp_path / 'net.onnx'}").files) == [".", "../net.bin"]

    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    assert sorted(sources.load(f"hf:{tmp_path / 'bert'}").files) == ["config.json", "model.safetensors"]

    from tests.toolchain.sources import tiny_diffusers as tiny

    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "DiTTransformer2DModel"]})
    )
    tiny.dit().save_pretrained(tmp_path / "pipe" / "transformer")  # type: ignore[operator]
    assert sorted(sources.load(f"diffusers:{tmp_path / 'pipe'}#transformer").files) == [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]


def test_a_checkpoint_and_a_graph_with_outside_data_move(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    export(f"hf:{tmp_path / 'bert'}", tmp_path / "out")
    (tmp_path / "bert").rename(tmp_path / "there")
    with pytest.raises(ToolchainError, match="not where it was"):
        open_subject(str(tmp_path / "out"))
    opened = open_subject(str(tmp_path / "out"), source=[tmp_path / "there"])
    assert opened.original is not None

    model = onnx.load(graphs.mixed(tmp_path / "plain.onnx"))
    (tmp_path / "old").mkdir()
    onnx.save(model, tmp_path / "old" / "n.onnx", save_as_external_data=True, location="n.bin", size_threshold=0)
    export(f"onnx:{tmp_path / 'old' / 'n.onnx'}?batch=1..4", tmp_path / "graph")
    (tmp_path / "old").rename(tmp_path / "new")
    opened = open_subject(str(tmp_path / "graph"), source=[tmp_path / "new" / "n.onnx"])
    assert opened.model is not None
    call = opened.model.batches(1, 0)[0]
    assert opened.original is not None
    wanted = opened.original(call)
    for name, array in next(iter(opened.runners.values()))(call).items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-5)


def test_weights_of_a_reference_model_move(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_file(sources.load("dit:tiny", seed=3).module.state_dict(), weights)
    export("dit:tiny", tmp_path / "out", weights=str(weights))
    moved = weights.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ToolchainError, match="not where it was"):
        enginewright.load_module(tmp_path / "out")
    assert enginewright.load_module(tmp_path / "out", source=moved) is not None


def test_a_model_of_the_hub_is_checked_when_it_was_fetched(tmp_path: Path) -> None:
    recipe = make({"model": "hf:owner/name"})
    (tmp_path / "config.json").write_text("{}")
    model = sources.load("dit:tiny")
    object.__setattr__(model, "files", {"config.json": tmp_path / "config.json"})
    found = origin.recorded(recipe, model)
    assert not found["local"]
    assert origin.located(recipe, found, (None,)) is recipe
    origin.check(model, found)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ToolchainError, match=r"config\.json has another SHA-256"):
        origin.check(model, found)
