"""What goes into a transformers network: everything that matters, at sizes that can be asked for; the rest is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from enginewright import pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import html, markdown
from enginewright.show import describe, tell
from enginewright.sources.contract import Model
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import draw
from tests.reports.example import example_report

T: Any = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
IMAGE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
BART = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40}
BART |= {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in (("attention_heads", 4), ("ffn_dim", 64))}
MIXTRAL = {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


def resnet() -> Any:
    return T.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 16, 32], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )


MODELS: dict[str, Callable[[], Any]] = {
    "layoutlm": lambda: T.LayoutLMModel(T.LayoutLMConfig(**TEXT, max_2d_position_embeddings=64)),
    "detr": lambda: T.DetrModel(
        T.DetrConfig(
            use_timm_backbone=False,
            backbone_config=resnet(),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_queries=6,
        )
    ),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**MIXTRAL)),
    "blip": lambda: T.BlipForConditionalGeneration(
        T.BlipConfig(text_config={**TEXT, "encoder_hidden_size": 32}, vision_config=IMAGE)
    ),
    "wav2vec2_layer": lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**SPEECH, feat_extract_norm="layer")),
    "wav2vec2_group": lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**SPEECH)),
    "beit": lambda: T.BeitModel(T.BeitConfig(**IMAGE, use_relative_position_bias=True)),
    "vitmae": lambda: T.ViTMAEModel(T.ViTMAEConfig(**IMAGE)),
    "videomae": lambda: T.VideoMAEModel(T.VideoMAEConfig(**IMAGE, num_frames=4)),
    "ast": lambda: T.ASTModel(T.ASTConfig(**IMAGE, max_length=24, num_mel_bins=16)),
    "mpnet": lambda: T.MPNetModel(T.MPNetConfig(**TEXT)),
    "xlnet": lambda: T.XLNetModel(T.XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=64)),
    "bert": lambda: T.BertModel(T.BertConfig(**TEXT)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=2048)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "bart": lambda: T.BartModel(T.BartConfig(**BART)),
    "vit": lambda: T.ViTModel(T.ViTConfig(**IMAGE)),
    "rwkv": lambda: T.RwkvModel(
        T.RwkvConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            context_length=64,
            attention_hidden_size=32,
            intermediate_size=64,
        )
    ),
    "choice": lambda: T.BertForMultipleChoice(T.BertConfig(**TEXT)),
    "depth": lambda: T.DepthAnythingForDepthEstimation(
        T.DepthAnythingConfig(
            backbone_config=T.Dinov2Config(
                **{**IMAGE, "image_size": 28, "patch_size": 14, "num_hidden_layers": 4},
                out_indices=[1, 2, 3, 4],
                reshape_hidden_states=False,
            ),
            reassemble_hidden_size=32,
            neck_hidden_sizes=[16] * 4,
            fusion_hidden_size=16,
            patch_size=14,
            head_hidden_size=8,
        )
    ),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model with random weights, written once. Read only."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            MODELS[name]().eval().save_pretrained(root / name)
        return root / name

    return folder


Folders = Callable[[str], Path]


def shapes(model: Model) -> dict[str, list[str | int]]:
    """Each input's shape, dimensions by name."""
    return {spec.name: [d.name if isinstance(d, Dim) else d for d in spec.shape] for spec in model.inputs}


def dims(model: Model) -> dict[str, Dim]:
    """The dimensions of a model that may change."""
    return {d.name: d for spec in model.inputs for d in spec.shape if isinstance(d, Dim)}


def exported(model: Model, path: Path) -> onnxruntime.InferenceSession:
    """An engine in full precision, with every dynamic dimension open."""
    sizes = {name: max(2, d.typical) for name, d in dims(model).items()}
    dynamic = {
        spec.name: {i: (d.name, d.low, d.high) for i, d in enumerate(spec.shape) if isinstance(d, Dim)}
        for spec in model.inputs
    }
    example = {name: torch.from_numpy(array) for name, array in draw(model.inputs, seed=0, sizes=sizes).items()}
    export_onnx(model.module, example, dynamic=dynamic, outputs=model.outputs, path=path)
    return onnxruntime.InferenceSession(path)


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("detr", "blip", "wav2vec2_layer")]


@pytest.mark.parametrize("name", ["layoutlm", "mixtral", *SLOWLY])
def test_the_engine_answers_like_the_network_called_by_hand(folder_of: Folders, name: str, tmp_path: Path) -> None:
    theirs = MODELS[name]().from_pretrained(folder_of(name), attn_implementation="eager").eval()
    ours = sources.load(f"hf:{folder_of(name)}" + ("?size=32" if name == "detr" else ""))
    session = exported(ours, tmp_path / "model.onnx")
    sizes = {"batch": 3, "sequence": 17, "samples": 2_345}
    for call in (draw(ours.inputs, seed=1, sizes=sizes), *ours.batches(1, 2)):
        with torch.no_grad():
            answer = theirs(**{key: torch.from_numpy(array) for key, array in call.items()})
        for output, found in zip(ours.outputs, session.run(None, call), strict=True):
            np.testing.assert_allclose(found, answer[output].numpy(), rtol=1e-3, atol=2e-4)


def test_a_layout_model_reads_where_its_tokens_stand(folder_of: Folders) -> None:
    model = sources.load(f"hf:{folder_of('layoutlm')}")
    assert shapes(model)["bbox"] == ["batch", "sequence", 4]
    boxes = draw(model.inputs, seed=0)["bbox"]
    assert boxes.max() < 64
    assert (boxes[..., 0] <= boxes[..., 2]).all()
    assert (boxes[..., 1] <= boxes[..., 3]).all()
    assert len(np.unique(boxes)) > 20


def test_sounds_have_a_mask_where_the_network_was_trained_with_one(folder_of: Folders) -> None:
    assert shapes(sources.load(f"hf:{folder_of('wav2vec2_layer')}"))["attention_mask"] == ["batch", "samples"]
    model = sources.load(f"hf:{folder_of('wav2vec2_group')}")
    assert list(shapes(model)) == ["input_values"]
    reasons = {entry.name: entry.reason for entry in model.left_out}
    assert "feat_extract_norm is 'group'" in reasons["attention_mask"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("detr", {"pixel_values": ["batch", 3, 224, 224], "pixel_mask": ["batch", 224, 224]}),
        ("vitmae", {"pixel_values": ["batch", 3, 16, 16], "noise": ["batch", 4]}),
        ("videomae", {"pixel_values": ["batch", 4, 3, 16, 16]}),
        ("ast", {"input_values": ["batch", 24, 16]}),
        ("depth", {"pixel_values": ["batch", 3, 28, 28]}),
    ],
)
def test_pictures_films_and_spectrograms_have_the_shape_of_the_configuration(
    folder_of: Folders, name: str, wanted: dict[str, list[str | int]]
) -> None:
    assert shapes(sources.load(f"hf:{folder_of(name)}")) == wanted


@pytest.mark.parametrize(("name", "longest"), [("mpnet", 38), ("bert", 40), ("xlnet", 512), ("gpt2", 512)])
def test_texts_are_as_long_as_the_network_has_positions(folder_of: Folders, name: str, longest: int) -> None:
    assert dims(sources.load(f"hf:{folder_of(name)}"))["sequence"].high == longest


def test_a_caption_belongs_to_its_picture_and_random_masking_is_an_input(folder_of: Folders) -> None:
    model = sources.load(f"hf:{folder_of('blip')}")
    assert {shape[0] for shape in shapes(model).values()} == {"batch"}
    mae = sources.load(f"hf:{folder_of('vitmae')}")
    call = {name: torch.from_numpy(array) for name, array in draw(mae.inputs, seed=0).items()}
    with torch.no_grad():
        torch.testing.assert_close(mae.module(**call)[0], mae.module(**call)[0], rtol=0, atol=0)


def test_what_is_no_input_is_named_with_its_reason(folder_of: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    found = describe(f"hf:{folder_of('bert')}")
    reasons = {entry["name"]: entry["reason"] for entry in found["left_out"]}
    assert {"position_ids", "inputs_embeds", "past_key_values", "encoder_hidden_states"} <= reasons.keys()
    assert not reasons.keys() & {"input_ids", "attention_mask", "token_type_ids", "output_attentions"}
    tell(found)
    assert "left out: position_ids (the model counts positions itself)" in capsys.readouterr().out


def test_a_validated_export_works_for_a_model_that_remembers_tensors_and_its_report_says_what_is_left_out(
    folder_of: Folders, tmp_path: Path
) -> None:
    targets = [{"target": "onnxruntime"}]
    validation = {"rounds": 3, "calls": 1}
    recipe = make({"model": f"hf:{folder_of('beit')}", "targets": targets, "validation": validation})
    report, _ = pipeline.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    assert min(figure.cosine for figure in report.targets[0].fidelity) > 0.9999
    assert "bool_masked_pos" in [entry.name for entry in report.model.inputs_left_out]
    assert any("pictures are 16 x 16" in note for note in report.model.notes)
    for page in ("report.html", "report.md"):
        assert "for pre-training" in (tmp_path / "out" / page).read_text()


def test_a_report_without_the_new_fields_is_read_and_rendered() -> None:
    report = example_report()
    assert report.model.inputs_left_out == []
    assert "source gave it" not in html.render(report)
    assert "not an input" not in markdown.render(report)


def test_sizes_can_be_asked_for(folder_of: Folders) -> None:
    model = sources.load(f"hf:{folder_of('gpt2')}?sequence=16..128..2048,batch=1")
    length = dims(model)["sequence"]
    assert (length.low, length.typical, length.high) == (16, 128, 2048)
    assert shapes(model)["input_ids"] == [1, "sequence"]
    said = sources.load(f"hf:{folder_of('gpt2')}").notes
    assert any("up to 512 tokens (the model has 2048); '?sequence=1..64..2048' asks for more" in note for note in said)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("bert", "sequence=1..64", "sequence is 64; the model has positions for 40 tokens"),
        ("bert", "sequense=8", "no dimension named 'sequense'"),
        ("bert", "size=8", "no dimension named 'size'"),
        ("bert", "sequence=9..8", "'sequence=9..8' is not NAME=SIZE"),
        ("bert", "batch=0", "batch is 0"),
        ("bert#encoder", "", "BertModel has no encoder apart"),
        ("t5#decoder", "", "no part of a transformers checkpoint named 'decoder'"),
    ],
)
def test_what_a_string_asks_for_in_vain(folder_of: Folders, name: str, asked: str, message: str) -> None:
    name, _, part = name.partition("#")
    text = f"hf:{folder_of(name)}" + (f"#{part}" if part else "") + (f"?{asked}" if asked else "")
    with pytest.raises(ToolchainError) as caught:
        sources.load(text)
    assert message in str(caught.value)


def test_pictures_of_another_size(folder_of: Folders, tmp_path: Path) -> None:
    model = sources.load(f"hf:{folder_of('vit')}?size=32")
    assert shapes(model) == {"pixel_values": ["batch", 3, 32, 32]}
    call = draw(model.inputs, seed=0)
    theirs = MODELS["vit"]().from_pretrained(folder_of("vit")).eval()
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(call["pixel_values"]), interpolate_pos_encoding=True)[0]
        torch.testing.assert_close(model.module(torch.from_numpy(call["pixel_values"]))[0], wanted)
    assert shapes(sources.load(f"hf:{folder_of('depth')}?height=42,width=28"))["pixel_values"] == ["batch", 3, 42, 28]


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ({"size": {"height": 42, "width": 28}}, (42, 28)),
        ({"size": {"shortest_edge": 50}, "crop_size": 42}, (42, 42)),
        ({"size": {"shortest_edge": 42}, "crop_size": 30, "do_center_crop": False}, (42, 42)),
        ({"image_processor": {"size": {"height": 56, "width": 56}}}, (56, 56)),
    ],
)
def test_the_preprocessor_says_how_large_pictures_are(
    folder_of: Folders, tmp_path: Path, content: dict[str, Any], size: tuple[int, int]
) -> None:
    model = sources.load(f"hf:{with_preprocessor(folder_of('depth'), tmp_path, content)}")
    assert shapes(model)["pixel_values"] == ["batch", 3, *size]
    assert any("as preprocessor_config.json has it (config.json: 28 x 28)" in note for note in model.notes)
    assert "preprocessor_config.json" in model.files


def test_a_preprocessor_that_the_network_cannot_follow_is_not_followed(folder_of: Folders, tmp_path: Path) -> None:
    model = sources.load(f"hf:{with_preprocessor(folder_of('vit'), tmp_path, {'size': 32})}")
    assert shapes(model)["pixel_values"] == ["batch", 3, 16, 16]
    assert any("as config.json has it" in note for note in model.notes)


def with_preprocessor(folder: Path, at: Path, content: dict[str, Any]) -> Path:
    """The same checkpoint with settings for its pictures."""
    for path in folder.iterdir():
        (at / path.name).symlink_to(path)
    (at / "preprocessor_config.json").write_text(json.dumps(content))
    return at


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_advice_for_an_encoder_with_a_decoder_works(folder_of: Folders, name: str, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        sources.load(f"hf:{folder_of(name)}")
    advice = str(caught.value.help).partition("'")[2].partition("'")[0]
    assert advice == f"hf:{folder_of(name)}#encoder"
    theirs = MODELS[name]().from_pretrained(folder_of(name)).eval().get_encoder()
    theirs.save_pretrained(tmp_path / "alone")
    for text in (advice, f"hf:{tmp_path / 'alone'}"):
        model = sources.load(text)
        call = {key: torch.from_numpy(array) for key, array in model.batches(1, 0)[0].items()}
        with torch.no_grad():
            torch.testing.assert_close(model.module(**call)[0], theirs(**call)[0])


def test_an_architecture_far_from_any_gets_a_few_names_and_not_a_thousand(folder_of: Folders, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["Zzyzx"]}))
    with pytest.raises(ToolchainError, match="no architecture of transformers named 'Zzyzx'") as caught:
        sources.load(f"hf:{tmp_path}")
    assert len(str(caught.value)) < 400


def test_what_a_network_raises_is_told_in_one_sentence(folder_of: Folders) -> None:
    with pytest.raises(ToolchainError) as caught:
        sources.load(f"hf:{folder_of('choice')}")
    message = str(caught.value)
    assert "BertForMultipleChoice cannot be called with input_ids (2, 40) int64, attention_mask (2, 40)" in message
    assert "invalid for input of size" in message
    assert "py:FILE:FUNCTION" in message


def test_a_network_that_writes_into_its_weights_is_refused_and_does_not_end_the_process(folder_of: Folders) -> None:
    with pytest.raises(ToolchainError, match=r"RwkvModel changes its own weights while it is called \(blocks\.0\."):
        sources.load(f"hf:{folder_of('rwkv')}")


def test_a_configuration_that_contradicts_itself(folder_of: Folders, tmp_path: Path) -> None:
    config = json.loads((folder_of("bert") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    (tmp_path / "model.safetensors").symlink_to(folder_of("bert") / "model.safetensors")
    with pytest.raises(ToolchainError, match=r"BertModel cannot be built from this configuration: .*multiple"):
        sources.load(f"hf:{tmp_path}")
