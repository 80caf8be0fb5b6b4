from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.models.blocks.transformer import Block, SelfAttention
from enginewright.models.vision import tnt
from enginewright.passes.contract import macs_of_shapes
from enginewright.targets.onnx_export import export_onnx

TINY = tnt.TINY
RELEASE = (
    *(0.91926, -0.89783, 1.75402, 1.54813, -0.26761, -0.08539, 1.53935, -1.05759, -0.28667, 0.72075),
    *(0.93669, -0.89405, 1.71257, 1.54803, -0.25969, -0.07537, 1.56698, -1.06554, -0.30186, 0.71629),
)


@cache
def meta(size: str) -> nn.Module:
    with torch.device("meta"):
        return tnt.build(tnt.PUBLISHED[size])


def loud(network: nn.Module) -> nn.Module:
    """The network with weights so large that every mechanism speaks up."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith(("position", "class_token")):
                weight.normal_()
            elif weight.dim() > 1:
                weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
            else:
                weight.normal_(mean=0.7 if "norm" in name and name.endswith("weight") else 0, std=0.3)
    return network.eval().requires_grad_(False)


def images(batch: int = 2) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, 3, TINY.side, TINY.side)


def release_shapes(config: tnt.Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint of the authors, in their order."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, config.width),
        "outer_tokens": (1, config.patches, config.width),
        "outer_pos": (1, config.patches + 1, config.width),
        "inner_pos": (1, config.words, config.word_width),
    }

    def layer(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def sentence(prefix: str, *, bias: bool) -> None:
        layer(f"{prefix}proj_norm1", config.words * config.word_width)
        layer(f"{prefix}proj", config.width, config.words * config.word_width, bias=bias)
        layer(f"{prefix}proj_norm2", config.width)

    def part(prefix: str, width: int) -> None:
        layer(f"{prefix}_norm1", width)
        layer(f"{prefix}_attn.qk", 2 * width, width, bias=False)
        layer(f"{prefix}_attn.v", width, width, bias=False)
        layer(f"{prefix}_attn.proj", width, width)
        layer(f"{prefix}_norm2", width)
        layer(f"{prefix}_mlp.fc1", config.mlp_ratio * width, width)
        layer(f"{prefix}_mlp.fc2", width, config.mlp_ratio * width)

    layer("patch_embed.proj", config.word_width, 3, 7, 7)
    sentence("", bias=True)
    for index in range(config.depth):
        part(f"blocks.{index}.inner", config.word_width)
        sentence(f"blocks.{index}.", bias=False)
        part(f"blocks.{index}.outer", config.width)
    layer("norm", config.width)
    layer("head", config.classes, config.width)
    return shapes


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that follow from their number alone, on any machine."""
    state = {}
    for index, (name, shape) in enumerate(shapes.items()):
        count = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        spread = 1.5 * float(np.prod(shape[1:])) ** -0.5 if name.endswith("weight") and len(shape) > 1 else 0.7
        state[name] = (spread * torch.sin(1.7 * count + 0.01 * count**2 + index)).view(shape)
    return state


@pytest.mark.parametrize(
    ("size", "count", "unused", "million", "macs", "giga"),
    [
        ("Ti", 6_076_408, 0, 6.1, 1_403_721_984, 1.4),
        ("S", 23_768_584, 75_264, 23.8, 5_216_875_008, 5.2),
        ("B", 65_428_680, 125_440, 65.6, 14_049_082_880, 14.1),
    ],
)
def test_parameters_and_macs_are_the_papers(
    size: str, count: int, unused: int, million: float, macs: int, giga: float
) -> None:
    network = meta(size)
    assert sum(weight.numel() for weight in network.parameters()) == count
    assert (count + unused) / 1e6 == pytest.approx(million, abs=0.05)
    found = macs_of_shapes(network, {"image": torch.zeros(1, 3, 224, 224, device="meta")})
    assert found == macs
    # All products and nothing else; 14.05 G of size B are printed as 14.1 G.
    assert found / 1e9 == pytest.approx(giga, abs=0.051)


@torch.no_grad()
def test_the_same_weights_give_the_outputs_of_the_release() -> None:
    """Recorded in float64 from huawei-noah/Efficient-AI-Backbones at f90e129, its sizes set to ours."""
    network = tnt.build(TINY).eval()
    weights = tnt.from_release(numbered(release_shapes(TINY)))
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    pixels = torch.arange(2 * 3 * 48 * 48, dtype=torch.float64) ** 1.5
    found = network(2 * torch.sin(pixels).float().view(2, 3, 48, 48))
    torch.testing.assert_close(found.flatten(), torch.tensor(RELEASE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", tnt.PUBLISHED)
def test_every_tensor_of_the_release_but_the_unused_has_its_place(size: str) -> None:
    shapes = release_shapes(tnt.PUBLISHED[size])
    state = tnt.from_release({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in meta(size).state_dict().items()
    }


def test_heads_of_words_are_narrow_and_heads_of_patches_64_wide() -> None:
    heads = {size: (meta(size).blocks[0].inner.attn, meta(size).blocks[0].outer.attn) for size in tnt.PUBLISHED}
    assert {size: (inner.head_dim, outer.head_dim) for size, (inner, outer) in heads.items()} == {
        "Ti": (6, 64),
        "S": (6, 64),
        "B": (10, 64),
    }


def test_norms_are_those_of_the_release() -> None:
    norms = [module for module in meta("S").modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 + 12 * 6 + 1
    assert {norm.eps for norm in norms} == {1e-5}


@torch.no_grad()
def test_words_see_no_pixel_of_another_patch() -> None:
    words, image = loud(tnt.Words(TINY)), images(1)
    other = image.clone()
    other[:, :, 16:32, 32:48] += 1  # the patch in row 1, column 2
    moved = (words(other) - words(image)).abs().amax((1, 2)) > 1e-4
    assert moved.tolist() == [index == 1 * 3 + 2 for index in range(9)]


@torch.no_grad()
def test_a_patch_is_cut_into_words_as_a_padded_picture_of_its_own_is() -> None:
    words, image = loud(tnt.Words(TINY)), images(1)
    patch = F.pad(image[0, :, 16:32, 32:48], (3, 3, 3, 3))
    row, column = 0, 3
    window = patch[:, 4 * row : 4 * row + 7, 4 * column : 4 * column + 7]
    wanted = torch.einsum("eckl,ckl->e", words.proj.weight, window) + words.proj.bias
    wanted = wanted + words.position[0, 4 * row + column]
    torch.testing.assert_close(words(image)[1 * 3 + 2, 4 * row + column], wanted)


@torch.no_grad()
def test_a_block_updates_words_first_and_tells_the_class_token_nothing() -> None:
    block = loud(tnt.TntBlock(TINY))
    block.outer = nn.Identity()
    words, tokens = torch.randn(2 * 9, 16, 12), torch.randn(2, 10, 32)
    related, told = block(words, tokens)
    assert torch.equal(told[:, 0], tokens[:, 0])
    torch.testing.assert_close(told[:, 1:] - tokens[:, 1:], block.sentence(block.inner(words)))
    assert (block.sentence(related) - block.sentence(words)).abs().max() > 0.1
    words[9 + 4, 7] += torch.randn(12)
    changed = (block(words, tokens)[0] - related).abs().amax(2) > 1e-5
    assert changed[9 + 4].all()
    assert changed.sum() == 16
    assert ((block(words, tokens)[1] - told).abs().amax(2) > 1e-5).nonzero().tolist() == [[1, 1 + 4]]


@torch.no_grad()
def test_when_words_say_nothing_what_is_left_is_a_plain_vision_transformer() -> None:
    network, image = loud(tnt.build(TINY)), images()
    tokens = torch.cat([network.class_token.expand(2, -1, -1), network.sentence(network.words(image))], dim=1)
    tokens = tokens + network.position
    for block in network.blocks:
        tokens = block.outer(tokens)
    plain = network.head(network.norm(tokens)[:, 0])
    assert (network(image) - plain).abs().max() > 0.1
    for block in network.blocks:
        block.sentence.norm2.weight.zero_()
        block.sentence.norm2.bias.zero_()
    torch.testing.assert_close(network(image), plain)


@torch.no_grad()
def test_patches_may_be_shuffled_with_their_positions_but_not_without() -> None:
    network, image = loud(tnt.build(TINY)), images()
    before = network(image)
    order = torch.randperm(9)
    cells = image.view(2, 3, 3, 16, 3, 16).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]  # (B, N, 3, P, P)
    shuffled = cells.view(2, 3, 3, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 48, 48)
    assert (network(shuffled) - before).abs().max() > 0.1
    network.position[:, 1:] = network.position[:, 1:][:, order]
    torch.testing.assert_close(network(shuffled), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_heads_of_words_may_be_padded_with_zeros_to_a_width_that_fused_kernels_take() -> None:
    narrow = loud(Block(12, 2, 4, qkv_bias=False)).attn  # heads of width 6
    wide = SelfAttention(12, 2, head_dim=8, qkv_bias=False).requires_grad_(False)
    weight = narrow.qkv.weight.view(3, 2, 6, 12) * torch.tensor([(8 / 6) ** 0.5, 1, 1]).view(3, 1, 1, 1)
    wide.qkv.weight.copy_(F.pad(weight, (0, 0, 0, 2)).reshape(48, 12))
    wide.proj.weight.copy_(F.pad(narrow.proj.weight.view(12, 2, 6), (0, 2)).reshape(12, 16))
    wide.proj.bias.copy_(narrow.proj.bias)
    x = torch.randn(5, 16, 12)
    torch.testing.assert_close(wide(x), narrow(x))


@torch.no_grad()
def test_the_onnx_graph_equals_the_network_for_any_number_of_images(tmp_path: Path) -> None:
    network = loud(tnt.build(TINY))
    dynamic = {"image": {0: ("batch", 1, 64)}}
    export_onnx(network, {"image": images()}, dynamic=dynamic, outputs=tnt.OUTPUTS, path=tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3, 64):
        image = images(batch)
        (found,) = session.run(None, {"image": image.numpy()})
        wanted = network(image)
        assert wanted.std() > 0.5
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
