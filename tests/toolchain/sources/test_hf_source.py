"""Every family at a tiny size, from a folder that transformers wrote; and what can be wrong with such a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.targets import stored
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import draw

transformers: Any = pytest.importorskip("transformers")
T = transformers

TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
IMAGE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
}
LLAMA = {**TEXT, "num_key_value_heads": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: T.BertModel(T.BertConfig(**TEXT)),
    "bert_classifier": lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT)),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**TEXT)),
    "t5_encoder": lambda: T.T5EncoderModel(
        T.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "vit_classifier": lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE)),
    "dinov2": lambda: T.Dinov2Model(T.Dinov2Config(**IMAGE)),
    "clip": lambda: T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)),
    "clip_text": lambda: T.CLIPTextModel(T.CLIPTextConfig(**TEXT)),
    "clip_vision": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**IMAGE)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40)),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)),
    "hubert": lambda: T.HubertModel(T.HubertConfig(**SPEECH)),
    "wav2vec2_ctc": lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**SPEECH)),
}


def saved(name: str, folder: Path) -> Any:
    """A tiny model with random weights, written to ``folder``."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(folder)
    return model


def outputs(model: Any, call: dict[str, Any]) -> list[np.ndarray]:
    """Every tensor that a model returns, in order, without a cache."""
    more = {"use_cache": False} if hasattr(model.config, "use_cache") and "decoder" not in call else {}
    with torch.no_grad():
        result = model(**{name: torch.from_numpy(array) for name, array in call.items()}, **more)
    return [value.numpy() for value in result.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_loads_in_place_and_exports_with_dynamic_sizes(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / "checkpoint")
    ours = sources.load(f"hf:{tmp_path / 'checkpoint'}")
    places = [stored.place_of(parameter) for parameter in ours.module.parameters()]
    copied = [name for (name, _), place in zip(ours.module.named_parameters(), places, strict=True) if place is None]
    assert not copied or "converted by transformers" in ours.weights, copied

    sizes = {d.name: max(2, d.typical) for spec in ours.inputs for d in spec.shape if not isinstance(d, int)}
    dynamic = {
        spec.name: {i: (d.name, d.low, d.high) for i, d in enumerate(spec.shape) if not isinstance(d, int)}
        for spec in ours.inputs
    }
    example = {k: torch.from_numpy(v) for k, v in draw(ours.inputs, seed=0, sizes=sizes).items()}
    path = tmp_path / "model.onnx"
    export_onnx(ours.module, example, dynamic=dynamic, outputs=ours.outputs, path=path)
    if name == "gpt2":  # its head is tied to its embeddings
        held = [list(each.dims) for each in onnx.load(path, load_external_data=False).graph.initializer]
        assert held.count([50, 32]) == 1
    session = onnxruntime.InferenceSession(path)
    others = dict.fromkeys(sizes, 3) | {key: 17 for key in sizes if key == "sequence"}
    others |= {key: 2_345 for key in sizes if key == "samples"}
    calls = [draw(ours.inputs, seed=1, sizes=others), *ours.batches(1, 2)]
    for call in calls:
        wanted = outputs(theirs, call)
        found = session.run(None, call)
        assert len(found) == len(wanted) == len(ours.outputs)
        for have, want in zip(found, wanted, strict=True):
            assert np.abs(want).max() > 1e-3
            np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-4)


def test_sizes_and_ranges_come_from_the_configuration(tmp_path: Path) -> None:
    saved("clip", tmp_path / "clip")
    model = sources.load(f"hf:{tmp_path / 'clip'}")
    found = {spec.name: spec for spec in model.inputs}
    assert list(found) == ["input_ids", "pixel_values", "attention_mask"]
    assert found["pixel_values"].shape[1:] == (3, 16, 16)
    assert (found["input_ids"].low, found["input_ids"].high) == (0, 50)
    length = found["input_ids"].shape[1]
    assert not isinstance(length, int)
    assert length.high == 40
    assert found["pixel_values"].shape[0] != found["input_ids"].shape[0]


def test_realistic_texts_end_early_and_their_mask_says_so(tmp_path: Path) -> None:
    saved("bert", tmp_path / "bert")
    model = sources.load(f"hf:{tmp_path / 'bert'}")
    assert model.mask == "attention_mask"  # padding behind the ends is not judged
    calls = model.batches(4, 0)
    masks = [call["attention_mask"] for call in calls]
    assert all((np.diff(mask, axis=1) <= 0).all() and mask[:, 0].all() for mask in masks)
    assert any((mask == 0).any() for mask in masks)
    assert not np.array_equal(calls[0]["input_ids"], calls[1]["input_ids"])


def test_a_tied_head_is_one_tensor_and_old_names_are_known(tmp_path: Path) -> None:
    theirs = saved("gpt2", tmp_path / "gpt2")
    module: Any = sources.load(f"hf:{tmp_path / 'gpt2'}").module
    assert module.lm_head.weight is module.transformer.wte.weight
    assert torch.equal(module.lm_head.weight, theirs.lm_head.weight)

    theirs = saved("bert", tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in load_file(weights).items()
    }
    save_file({**old, "bert.embeddings.position_ids": torch.arange(40), "cls.bias": torch.ones(3)}, weights)
    module = sources.load(f"hf:{tmp_path / 'bert'}").module
    assert torch.equal(module.encoder.layer[0].output.LayerNorm.weight, theirs.encoder.layer[0].output.LayerNorm.weight)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    saved("bert", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(folder: Path, **changes: object) -> None:
    """Change the configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path | str) -> str:
    with pytest.raises(ToolchainError) as caught:
        sources.load(f"hf:{folder}")
    return str(caught.value)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "'empty' has no config.json" in refused(tmp_path / "empty")


def test_an_architecture_that_is_not_known_gets_the_nearest_name(checkpoint: Path) -> None:
    edit(checkpoint, architectures=["BertModul"])
    message = refused(checkpoint)
    assert "no architecture of transformers named 'BertModul'" in message
    assert "did you mean 'BertModel'?" in message


def test_a_type_that_transformers_does_not_know(checkpoint: Path) -> None:
    edit(checkpoint, model_type="telepathy")
    message = refused(checkpoint)
    assert "transformers cannot read this configuration" in message
    assert "telepathy" in message


def test_a_configuration_without_architectures_gives_the_plain_model(checkpoint: Path) -> None:
    edit(checkpoint, architectures=None)
    assert type(sources.load(f"hf:{checkpoint}").module).__name__ == "BertModel"


def test_weights_that_are_missing_are_listed(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, checkpoint / "model.safetensors")
    message = refused(checkpoint)
    assert "does not fit the model (1 tensors): missing encoder.layer.1.output.dense.weight" in message


def test_shapes_that_contradict_the_configuration(checkpoint: Path) -> None:
    edit(checkpoint, intermediate_size=96)
    message = refused(checkpoint)
    assert "encoder.layer.0.intermediate.dense.weight is (64, 32), the model has (96, 32)" in message


def test_a_file_that_is_cut_short(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut short" in refused(checkpoint)


def test_pickled_weights_are_never_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    message = refused(checkpoint)
    assert "no safetensors weights" in message
    assert "pickles" in message


def test_an_encoder_with_a_decoder_is_two_engines(tmp_path: Path) -> None:
    T.T5Model(T.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)).save_pretrained(
        tmp_path / "t5"
    )
    assert "T5Model is an encoder and a decoder" in refused(tmp_path / "t5")


def test_code_in_the_folder_is_not_run_unasked(checkpoint: Path) -> None:
    edit(
        checkpoint, model_type="mine", architectures=["Mine"], auto_map={"AutoConfig": "mine.C", "AutoModel": "mine.M"}
    )
    (checkpoint / "mine.py").write_text("raise SystemExit('was run')\n")
    message = refused(checkpoint)
    assert "--trust-remote-code" in message
    assert "was run" not in message


def test_tokenizer_files_go_along(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "vocab.txt").write_text("a\n")
    shutil.copyfile(checkpoint / "config.json", checkpoint / "unrelated.json")
    carried = {path.name for path in sources.load(f"hf:{checkpoint}").carried}
    assert carried == {"config.json", "tokenizer.json", "vocab.txt"}
