from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from enginewright import sources
from enginewright.ground.signature import Arrays
from enginewright.models.blocks.digits import JUDGED, held_out
from enginewright.models.vision import vit
from enginewright.passes.contract import Context, macs_of_shapes
from enginewright.passes.pruning.prune_depth import PruneDepth
from enginewright.passes.tokens.merge_tokens import MergeTokens
from enginewright.passes.tokens.prune_tokens import PruneTokens
from enginewright.passes.traits import FeedForward, HeadedAttention, TokenStack, layers_of
from enginewright.sources.reference import WEIGHTS
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.metrics.accuracy import Accuracy

TINY = vit.TINY


@cache
def meta(size: str) -> nn.Module:
    with torch.device("meta"):
        return vit.build(vit.PUBLISHED[size])


def loud(network: nn.Module) -> nn.Module:
    """The network with weights so large that every mechanism speaks up."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name in ("position", "class_token"):
                weight.normal_()
            elif weight.dim() > 1:
                weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
            else:
                weight.normal_(mean=0.7 if "norm" in name and name.endswith("weight") else 0, std=0.3)
    return network.eval().requires_grad_(False)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, TINY.side, TINY.side, generator=torch.Generator().manual_seed(2))


def of_transformers(network: nn.Module, config: vit.Config) -> nn.Module:
    """The same network of transformers, with the same weights."""
    import transformers

    hidden = {"hidden_size": config.width, "intermediate_size": config.mlp_ratio * config.width}
    pictures = {"image_size": config.side, "patch_size": config.patch, "num_channels": config.channels}
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **hidden,
            **pictures,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_labels=config.classes,
            layer_norm_eps=1e-6,
        )
    ).eval()
    state: dict[str, Tensor] = {}
    whole = {
        "class_token": "vit.embeddings.cls_token",
        "position": "vit.embeddings.position_embeddings",
        "patch_embed": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for name, tensor in network.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if not path.startswith("blocks"):
            state[f"{whole[path]}.{leaf}" if path else whole[leaf]] = tensor
            continue
        _, number, part = path.split(".", 2)
        if part == "attn.qkv":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vit.layers.{number}.attention.{letter}_proj.{leaf}"] = third
        else:
            state[f"vit.layers.{number}.{parts[part]}.{leaf}"] = tensor
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize(
    ("size", "count", "macs"),
    [
        ("Ti/16", 5_717_416, 1_253_683_200),
        ("S/16", 22_050_664, 4_598_882_304),
        ("B/16", 86_567_656, 17_563_828_224),
        ("L/16", 304_326_632, 61_554_712_576),
    ],
)
def test_parameters_and_macs_are_the_published_ones(size: str, count: int, macs: int) -> None:
    assert sum(weight.numel() for weight in meta(size).parameters()) == count
    assert macs_of_shapes(meta(size), {"image": torch.zeros(1, 3, 224, 224, device="meta")}) == macs


@torch.no_grad()
def test_the_same_weights_give_the_outputs_of_transformers() -> None:
    network, image = loud(vit.build(TINY)), images()
    wanted = of_transformers(network, TINY)(pixel_values=image).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(network(image), wanted, rtol=1e-4, atol=1e-4)
    for part in (network.position, network.blocks[1].norm2.weight, network.head.bias):
        kept = part.clone()
        part.mul_(1.5)
        assert (network(image) - wanted).abs().max() > 1e-2
        part.copy_(kept)


def test_a_checkpoint_of_the_authors_has_a_place_for_each_tensor() -> None:
    shapes = {name: tensor.shape for name, tensor in meta("S/16").state_dict().items()}
    theirs = {"class_token": "cls_token", "position": "pos_embed"}
    release = {
        theirs.get(name, name.replace("patch_embed.", "patch_embed.proj.")): torch.empty(shape, device="meta")
        for name, shape in shapes.items()
    }
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= release.keys()
    assert {name: tensor.shape for name, tensor in vit.from_release(release).items()} == shapes


def test_passes_find_heads_feed_forwards_blocks_and_tokens() -> None:
    network = vit.build(TINY)
    assert len(list(layers_of(network, HeadedAttention))) == TINY.depth
    assert len(list(layers_of(network, FeedForward))) == TINY.depth
    ((path, stack),) = layers_of(network, TokenStack)
    assert (path, stack.path, stack.leading, stack.square, stack.reads_all) == ("", "blocks", 1, True, False)


@pytest.mark.parametrize(
    "step",
    [PruneTokens(keep=0.5), PruneTokens(method="policy", keep=0.5), MergeTokens(r=2), PruneDepth(share=0.34)],
    ids=["attention", "policy", "merge", "depth"],
)
def test_passes_that_shorten_it_change_it_and_make_it_cheaper(step: Any) -> None:
    network, call = loud(vit.build(TINY)), {"image": images()}
    before = network(call["image"])
    context = Context(example=call, calibration=[call], original=network)
    result = step.apply(loud(vit.build(TINY)), context)
    assert result.changed
    assert result.after.macs < result.before.macs
    assert (result.model(call["image"]) - before).abs().max() > 1e-2
    if isinstance(step, PruneTokens | MergeTokens):
        nothing = type(step)(**({"keep": 1} if isinstance(step, PruneTokens) else {"r": 0}))
        torch.testing.assert_close(nothing.apply(loud(vit.build(TINY)), context).model(call["image"]), before)


@torch.no_grad()
def test_the_onnx_graph_equals_the_network_for_any_number_of_images(tmp_path: Path) -> None:
    network = loud(vit.build(TINY))
    dynamic = {"image": {0: ("batch", 1, 64)}}
    export_onnx(network, {"image": images()}, dynamic=dynamic, outputs=vit.OUTPUTS, path=tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3, 64):
        (found,) = session.run(None, {"image": images(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network(images(batch)), rtol=1e-4, atol=1e-4)


# Digits


def test_held_out_digits_come_in_turns_and_are_not_those_of_the_judges_training() -> None:
    pictures, classes = held_out()
    assert pictures.shape == (1000, 1, 28, 28)
    assert (pictures.min(), pictures.max()) == (-1, 1)
    assert classes.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 100
    known = load_file(WEIGHTS / "digits-reference.safetensors")["pictures"]  # of the judge's own test digits
    assert np.array_equal(((pictures[:20] + 1) * 127.5).round().astype(np.uint8), known.numpy())


def run(module: nn.Module, arrays: Arrays) -> Arrays:
    with torch.no_grad():
        return {"logits": module(torch.from_numpy(arrays["image"])).numpy()}


def test_the_shipped_weights_tell_digits_that_they_were_not_trained_on() -> None:
    model = sources.load("vit:digits")
    task = model.task
    assert task is not None
    told = task.sample(partial(run, model.module), task.samples, 0)
    assert told.shape == (JUDGED, 2)
    assert Accuracy().measure(task, told, told) >= 0.97  # type: ignore[arg-type]
    blind = task.sample(lambda arrays: {"logits": np.ones((len(arrays["image"]), 10))}, 100, 0)
    assert Accuracy().measure(task, blind, blind) < 0.3  # type: ignore[arg-type]
    assert sources.load("vit:tiny").task is None


def test_calibration_sees_no_digit_that_is_judged() -> None:
    model, pictures = sources.load("vit:digits"), held_out()[0]
    assert model.realistic is not None
    judged = {each.tobytes() for each in pictures[:JUDGED]}
    for call in model.realistic(40, 3):
        assert call["image"].shape == (2, 1, 28, 28)
        assert not judged.intersection(each.tobytes() for each in call["image"])
