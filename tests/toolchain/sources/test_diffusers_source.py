from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Arrays, Dim
from enginewright.sources import autoencoders
from enginewright.sources.contract import Model
from enginewright.sources.diffusers_source import components, load
from enginewright.sources.filling import on_meta
from enginewright.targets import stored
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import draw
from tests.toolchain.sources import tiny_diffusers as tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"

SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "dit": ({"batch": 1}, {"batch": 3}),
    "pixart": ({"batch": 1, "text": 5}, {"batch": 3, "text": 130}),
    "pixart_conditioned": ({"batch": 1, "text": 5}, {"batch": 3, "text": 130}),
    "unet": ({"batch": 1, "text": 3, "height": 4, "width": 14}, {"batch": 3, "text": 80, "height": 16, "width": 6}),
    "unet_xl": ({"batch": 1, "text": 3, "height": 4, "width": 14}, {"batch": 3, "text": 80, "height": 16, "width": 6}),
    "sd3": ({"batch": 1, "text": 3, "height": 4, "width": 12}, {"batch": 3, "text": 340, "height": 10, "width": 6}),
    "flux": ({"batch": 1, "image": 256, "text": 7}, {"batch": 3, "image": 300, "text": 20}),
    "cogvideox": ({"batch": 1}, {"batch": 3}),
    "cogvideox_rotary": (
        {"batch": 1, "frames": 2, "height": 4, "width": 14, "tokens": 14},
        {"batch": 3, "frames": 6, "height": 10, "width": 6, "tokens": 45},
    ),
    "vae_decoder": ({"batch": 1, "height": 5, "width": 16}, {"batch": 3, "height": 9, "width": 4}),
    "vae_encoder": ({"batch": 1, "height": 8, "width": 30}, {"batch": 3, "height": 22, "width": 10}),
    "text_encoder": ({"batch": 1}, {"batch": 3}),
    "text_encoder_2": ({"batch": 1}, {"batch": 3}),
    "text_encoder_3": ({"batch": 1, "text": 3}, {"batch": 3, "text": 90}),
}
"""Two settings of every dynamic dimension, both unlike the sizes it was traced at."""


class Shelf:
    """Every family once, saved by its own library; networks, and model strings for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.networks: dict[str, nn.Module] = {}
        for name, make in tiny.NETWORKS.items():
            self.networks[name] = tiny.shaken(make())
            self.networks[name].save_pretrained(root / name)  # type: ignore[operator]
        encoders = tiny.text_encoders()
        vae = tiny.shaken(tiny.autoencoder())
        self.networks |= encoders | {"vae_decoder": vae, "vae_encoder": vae}
        parts = {"unet": self.networks["unet"], "vae": vae, **encoders}
        index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
        for name, part in parts.items():
            part.save_pretrained(root / "pipeline" / name)  # type: ignore[operator]
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        (root / "pipeline" / "model_index.json").write_text(json.dumps(index))

    def text(self, name: str) -> str:
        return (
            f"diffusers:{self.root / name}" if name in tiny.NETWORKS else f"diffusers:{self.root / 'pipeline'}#{name}"
        )


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def folder(shelf: Shelf, tmp_path: Path) -> Path:
    """A copy of one network's folder, to be damaged."""
    return Path(shutil.copytree(shelf.root / "sd3", tmp_path / "sd3"))


@pytest.fixture
def pipeline(shelf: Shelf, tmp_path: Path) -> Path:
    """A copy of the pipeline's folder, to be damaged."""
    return Path(shutil.copytree(shelf.root / "pipeline", tmp_path / "pipeline"))


def run(model: Model, arrays: Arrays) -> list[Tensor]:
    with torch.no_grad():
        found = model.module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    return list(found) if isinstance(found, tuple) else [found]


def as_pipelines_call(name: str, network: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the library's own network gives, called the way its pipelines call it."""
    with torch.no_grad():
        if name == "vae_decoder":
            return [network.decode(inputs["z"]).sample]
        if name == "vae_encoder":
            return [network.encode(inputs["x"]).latent_dist.parameters]
        if name in ("text_encoder", "text_encoder_2"):
            found = network(inputs["input_ids"], output_hidden_states=True)
            return [found[0], found[1], torch.stack(found.hidden_states)]
        if name.startswith("pixart"):
            added = {key: inputs.pop(key, None) for key in ("resolution", "aspect_ratio")}
            return [network(**inputs, added_cond_kwargs=added).sample]
        if name == "unet_xl":
            added = {key: inputs.pop(key) for key in ("text_embeds", "time_ids")}
            return [network(**inputs, added_cond_kwargs=added).sample]
        if name == "cogvideox_rotary":
            tables = tuple(inputs.pop(f"image_rotary_emb_{i}") for i in range(2))
            return [network(**inputs, image_rotary_emb=tables).sample]
        return [network(**inputs)[0]]


@pytest.mark.parametrize("name", SIZES)
def test_outputs_are_those_of_the_library_and_weights_stay_on_disk(shelf: Shelf, name: str) -> None:
    model = load(shelf.text(name))
    (arrays,) = model.batches(1, 0)
    network = shelf.networks[name]
    expected = as_pipelines_call(name, network, {key: torch.from_numpy(array) for key, array in arrays.items()})

    found = run(model, arrays)

    assert len(found) == len(expected) == len(model.outputs)
    assert all(tensor.std() > 0.01 for tensor in expected)
    for ours, theirs in zip(found, expected, strict=True):
        # Flux rounds its rotary angles to float32.
        torch.testing.assert_close(ours, theirs, atol=2e-4 if name == "flux" else 1e-6, rtol=1e-6)
    assert not model.module.training
    assert not on_meta(model.module)
    assert not [key for key, p in model.module.named_parameters() if stored.place_of(p) is None]


SLOW = ("unet",)
"""What another one covers with more inputs."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SIZES]
)
def test_the_graph_agrees_at_every_size_it_declares(shelf: Shelf, name: str, tmp_path: Path) -> None:
    agrees(load(shelf.text(name)), SIZES[name], tmp_path)
    assert onnx.TensorProto.DOUBLE not in kinds_in(tmp_path / "model.onnx")  # TensorRT has none


def kinds_in(path: Path) -> set[int]:
    """Element types of every tensor of a graph."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.type.tensor_type.elem_type for value in values} | {tensor.data_type for tensor in graph.initializer}


def agrees(model: Model, sizes: tuple[dict[str, int], ...], folder: Path) -> None:
    """Export as the pipeline does, and compare with PyTorch at other sizes."""
    dims = {d.name: d for spec in model.inputs for d in spec.shape if isinstance(d, Dim)}
    typical = {name: max(dim.typical, 2) for name, dim in dims.items()}
    dynamic = {
        spec.name: {i: (d.name, d.low, d.high) for i, d in enumerate(spec.shape) if isinstance(d, Dim)}
        for spec in model.inputs
    }
    example = {key: torch.from_numpy(array) for key, array in draw(model.inputs, seed=0, sizes=typical).items()}
    path = folder / "model.onnx"
    export_onnx(model.module, example, dynamic=dynamic, outputs=model.outputs, path=path)
    session = onnxruntime.InferenceSession(path)
    for chosen in sizes:
        assert chosen.keys() == dims.keys()
        assert not any(dims[key].fault_of(size) for key, size in chosen.items())
        assert all(size != typical[key] for key, size in chosen.items())
        arrays = draw(model.inputs, seed=1, sizes=chosen)
        for ours, theirs in zip(session.run(None, arrays), run(model, arrays), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # the loop over frames is unrolled
def test_a_clip_decoder_agrees_at_every_size_it_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoders, "LATENT_FRAMES", 5)
    tiny.shaken(tiny.clip_autoencoder()).save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    model = load(f"diffusers:{tmp_path / 'vae'}#vae_decoder")
    agrees(model, ({"batch": 1, "height": 1, "width": 6}, {"batch": 3, "height": 3, "width": 2}), tmp_path)


def test_a_clip_decoder_gives_what_the_library_gives(tmp_path: Path) -> None:
    vae: Any = tiny.shaken(tiny.clip_autoencoder())
    vae.save_pretrained(tmp_path / "vae")
    assert components(f"diffusers:{tmp_path / 'vae'}") == [f"diffusers:{tmp_path / 'vae'}#vae_decoder"]
    model = load(f"diffusers:{tmp_path / 'vae'}#vae_decoder")
    (arrays,) = model.batches(1, 0)
    with torch.no_grad():
        torch.testing.assert_close(run(model, arrays)[0], vae.decode(torch.from_numpy(arrays["z"])).sample)


def test_half_and_bfloat16_weights_stay_so_between_float32_inputs_and_outputs(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16):
        network: Any = tiny.shaken(tiny.sd3()).to(kind)
        network.save_pretrained(tmp_path / str(kind))
        model = load(f"diffusers:{tmp_path / str(kind)}")
        (arrays,) = model.batches(1, 0)
        inputs = {key: torch.from_numpy(array).to(kind) for key, array in arrays.items() if key != "timestep"}
        with torch.no_grad():
            expected = network(**inputs, timestep=torch.from_numpy(arrays["timestep"])).sample
        assert {p.dtype for p in model.module.parameters()} == {kind}
        assert all(array.dtype == np.float32 for array in arrays.values())
        torch.testing.assert_close(run(model, arrays)[0], expected.float())


def test_the_interface_is_that_of_the_network_that_pipelines_call(shelf: Shelf) -> None:
    how = load(shelf.text("unet_xl")).interface
    assert how is not None
    assert how.arguments[:3] == ("sample", "timestep", "encoder_hidden_states")
    assert "added_cond_kwargs" in how.arguments
    assert how.returns == "diffusers.models.unets.unet_2d_condition:UNet2DConditionOutput"
    assert (how.keys, how.module, how.config["in_channels"]) == (("sample",), "inner", 4)
    assert not [key for key in how.config if key.startswith("_")]

    model = load(shelf.text("vae_decoder"))
    assert model.interface is not None
    assert model.interface.arguments == ("z", "return_dict", "generator")
    assert model.interface.returns == "diffusers.models.autoencoders.vae:DecoderOutput"
    assert model.interface.config["scaling_factor"] == 0.18215

    model = load(shelf.text("text_encoder_2"))
    assert model.interface is not None
    assert model.interface.keys == model.outputs == ("text_embeds", "last_hidden_state", "hidden_states")


def test_half_an_autoencoder_carries_no_weights_of_the_other(shelf: Shelf) -> None:
    halves = [load(shelf.text(name)).module for name in ("vae_decoder", "vae_encoder")]
    counts = [sum(p.numel() for p in half.parameters()) for half in halves]
    assert sum(counts) == sum(p.numel() for p in shelf.networks["vae_decoder"].parameters())


def test_a_pipeline_lists_its_components_and_is_not_loaded_whole(shelf: Shelf) -> None:
    text = f"diffusers:{shelf.root / 'pipeline'}"
    names = ["unet", "text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder", "vae_encoder"]
    assert components(text) == [f"{text}#{name}" for name in names]
    assert components(f"{text}#unet") == [f"{text}#unet"]
    assert components(shelf.text("dit")) == [shelf.text("dit")]
    with pytest.raises(ToolchainError, match=r"holds several networks(.|\n)*unet, text_encoder, .*vae_decoder"):
        load(text)


def test_a_component_that_is_not_there_offers_the_nearest(shelf: Shelf) -> None:
    with pytest.raises(ToolchainError, match=r"no component named 'vae'(.|\n)*did you mean 'vae_.*here: unet, text"):
        load(f"diffusers:{shelf.root / 'pipeline'}#vae")
    with pytest.raises(ToolchainError, match=r"no component named 'transformer'"):
        components(f"diffusers:{shelf.root / 'pipeline'}#transformer")


@pytest.mark.parametrize("name", ["../sd3", "/etc", "unet/../../sd3"])
def test_a_component_outside_the_folder_is_refused(shelf: Shelf, name: str) -> None:
    with pytest.raises(ToolchainError, match="points outside its folder; refused"):
        load(f"diffusers:{shelf.root / 'pipeline'}#{name}")


def test_a_folder_without_a_configuration_says_so(tmp_path: Path, folder: Path, pipeline: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolchainError, match=r"neither model_index.json nor config.json in 'empty'"):
        load(f"diffusers:{tmp_path / 'empty'}")
    (pipeline / "unet" / "config.json").unlink()
    with pytest.raises(ToolchainError, match=r"no config.json in 'unet'"):
        load(f"diffusers:{pipeline}#unet")
    (folder / "config.json").write_text("{")
    with pytest.raises(ToolchainError, match=r"config.json cannot be read"):
        load(f"diffusers:{folder}")


def edit(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_a_class_that_is_not_covered_offers_the_nearest_and_a_way_out(folder: Path, pipeline: Path) -> None:
    edit(folder / "config.json", _class_name="Flux2Transformer2DModel")
    with pytest.raises(ToolchainError, match=r"Flux2Transformer2DModel of diffusers is not(.|\n)*supported: .*use py:"):
        load(f"diffusers:{folder}")
    edit(folder / "config.json", _class_name="FluxTransformer3DModel")
    with pytest.raises(ToolchainError, match=r"'FluxTransformer3DModel'(.|\n)*'FluxTransformer2DModel'.*use py:"):
        load(f"diffusers:{folder}")
    edit(folder / "config.json", _class_name="")
    with pytest.raises(ToolchainError, match=r"names no class of diffusers(.|\n)*hf:"):
        load(f"diffusers:{folder}")
    edit(pipeline / "model_index.json", text_encoder=["transformers", "CLIPTextModelX"], unet=["unet_code", "MyUNet"])
    with pytest.raises(ToolchainError, match=r"'CLIPTextModelX'(.|\n)*did you mean 'CLIPTextModel'"):
        load(f"diffusers:{pipeline}#text_encoder")
    with pytest.raises(ToolchainError, match=r"'MyUNet' that comes with code of its own \(unet_code\)(.|\n)*py:"):
        load(f"diffusers:{pipeline}#unet")


def test_a_unet_conditioned_in_another_way_is_refused(tmp_path: Path) -> None:
    network: Any = tiny.unet(class_embed_type="timestep")
    network.save_pretrained(tmp_path / "unet")
    with pytest.raises(ToolchainError, match=r"class_embed_type = 'timestep', which is not covered(.|\n)*py:"):
        load(f"diffusers:{tmp_path / 'unet'}")


def test_weights_that_are_quantized_already_are_refused(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ToolchainError, match=r"quantized already \(bitsandbytes\)"):
        load(f"diffusers:{folder}")


def test_weights_that_do_not_fit_are_listed(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["proj_out.bias"]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ToolchainError, match=r"does not fit the model \(1 tensors\): missing proj_out.bias"):
        load(f"diffusers:{folder}")
    state["proj_out.bias"] = torch.zeros(3)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ToolchainError, match=r"proj_out.bias is \(3,\), the model has \(16,\)"):
        load(f"diffusers:{folder}")


def test_a_configuration_that_contradicts_the_weights_or_itself_is_an_error(folder: Path) -> None:
    edit(folder / "config.json", num_attention_heads=4)
    with pytest.raises(ToolchainError, match=r"does not fit the model .* the model has"):
        load(f"diffusers:{folder}")
    edit(folder / "config.json", qk_norm="no_such_norm")
    with pytest.raises(ToolchainError, match=r"config.json describes no SD3Transformer2DModel: .*no_such_norm"):
        load(f"diffusers:{folder}")


def test_a_missing_shard_is_named(folder: Path, shelf: Shelf) -> None:
    (folder / WEIGHTS).unlink()
    network: Any = shelf.networks["sd3"]
    network.save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("*-00002-*"))[0]
    assert load(f"diffusers:{folder}").outputs == ("sample",)  # whole, it loads
    shard.unlink()
    with pytest.raises(ToolchainError, match=rf"shards are missing: {shard.name}"):
        load(f"diffusers:{folder}")


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ToolchainError, match=r"no safetensors weights(.|\n)*pickles and are never read"):
        load(f"diffusers:{folder}")


@pytest.mark.parametrize(("name", "norm"), [("dit", "ada_norm_zero"), ("pixart", "ada_norm_single")])
def test_the_old_name_of_a_class_is_known(shelf: Shelf, tmp_path: Path, name: str, norm: str) -> None:
    folder = Path(shutil.copytree(shelf.root / name, tmp_path / name))
    edit(folder / "config.json", _class_name="Transformer2DModel", norm_type=norm)
    model = load(f"diffusers:{folder}")
    assert isinstance(model.module.inner, type(shelf.networks[name]))


def test_old_names_of_tensors_are_known(shelf: Shelf, pipeline: Path) -> None:
    """Stable Diffusion's own files are of that time."""
    vae, clip = pipeline / "vae" / WEIGHTS, pipeline / "text_encoder" / "model.safetensors"
    new = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    state = load_file(vae)
    for today, then in new:
        state = {key.replace(f".{today}.", f".{then}."): tensor for key, tensor in state.items()}
    assert any(".query." in key for key in state)
    save_file(state, vae)
    state = {f"text_model.{key}": tensor for key, tensor in load_file(clip).items()}
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(12)[None]}, clip)
    for name in ("vae_decoder", "text_encoder"):
        (arrays,) = load(shelf.text(name)).batches(1, 0)
        ours, theirs = run(load(f"diffusers:{pipeline}#{name}"), arrays), run(load(shelf.text(name)), arrays)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_name_on_the_hub_fetches_only_what_one_component_needs(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "some/pipeline"
        asked.append(allow_patterns)
        return str(pipeline)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load("diffusers:some/pipeline#unet").weights == "those of UNet2DConditionModel in some/pipeline"
    stem = "unet/diffusion_pytorch_model"
    assert asked == [
        ["model_index.json", "config.json"],
        ["unet/*.json", f"{stem}.safetensors", f"{stem}-*.safetensors"],
    ]


def test_the_source_is_found_by_its_prefix(shelf: Shelf) -> None:
    assert sources.load(shelf.text("dit")).name == "diffusers:dit"


@pytest.mark.parametrize("name", ["AuraFlowTransformer2DModel", "ControlNetModel"])
def test_a_network_that_is_not_supported_is_not_taken_for_another(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ToolchainError) as caught:
        load(f"diffusers:{tmp_path}")
    message = str(caught.value)
    assert f"{name} of diffusers is not supported here" in message
    assert "did you mean" not in message
    assert "supported: CogVideoXTransformer3DModel, " in message
    assert "py:FILE:FUNCTION" in message


def test_arguments_that_the_engine_has_no_input_for_are_named(tmp_path: Path) -> None:
    network: Any = tiny.unet()
    network.save_pretrained(tmp_path)
    absent = {entry.name for entry in load(f"diffusers:{tmp_path}").left_out}
    assert {"timestep_cond", "mid_block_additional_residual", "down_block_additional_residuals"} <= absent
    assert not absent & {"sample", "timestep", "encoder_hidden_states"}
