from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.models.vision import drsformer
from enginewright.models.vision.drsformer import (
    TINY,
    ChannelNorm,
    ExpertStep,
    MixedScaleFeedForward,
    MixtureOfExperts,
    SparseChannelAttention,
)
from enginewright.passes.contract import macs_of_shapes
from enginewright.targets.onnx_export import export_onnx
from tests.engines import in_onnxruntime

WHOLE = replace(TINY, blocks=(2, 1, 1, 1), steps=2)
"""Small, with blocks at every level."""

RELEASE = (
    *(0.61867, -0.30692, 0.77892),  # mean of what is added to each colour
    *(2.89752, 2.82347, 3.02422),  # deviation of it
    *(-1.63407, 0.04129, -0.5494),  # at row 0, column 31
    *(-0.19564, 0.95869, 2.49611),  # at row 17, column 6
)


def meta(size: str) -> nn.Module:
    with torch.device("meta"):
        return drsformer.build(drsformer.PUBLISHED[size]).eval()


def numbered(net: nn.Module) -> nn.Module:
    """The network with weights that follow from their number alone, on any machine."""
    for index, (name, weight) in enumerate(net.named_parameters()):
        count = torch.arange(weight.numel(), dtype=torch.float64)
        wave = torch.sin(1.7 * count + 0.37 * count**2 + index).view(weight.shape)
        if name.endswith("temperature"):
            weight.data.copy_(4 + 2 * wave)
        elif name.endswith("norm1.weight"):
            weight.data.copy_(1 + 0.5 * wave)
        else:
            weight.data.copy_(1.8 * wave * (weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.3))
    return net.eval().requires_grad_(False)


def attention(width: int = 20, heads: int = 2) -> SparseChannelAttention:
    layer = SparseChannelAttention(width, heads)
    numbered(layer)
    return layer


def four_products(layer: SparseChannelAttention, x: Tensor) -> Tensor:
    """The layer as the paper puts it: for each share a mask of the largest scores, a softmax, a product with values."""
    batch, width, height, across = x.shape
    heads, channels = layer.heads, width // layer.heads
    qkv = F.conv2d(F.conv2d(x, layer.qkv.weight), layer.qkv_depthwise.weight, padding=1, groups=3 * width)
    q, k, v = qkv.view(batch, 3, heads, channels, -1).unbind(1)
    scores = F.normalize(q, dim=3) @ F.normalize(k, dim=3).mT * layer.temperature
    y = torch.zeros_like(v)
    for share, weight in zip((1 / 2, 2 / 3, 3 / 4, 4 / 5), layer.blend, strict=True):
        largest = scores.topk(int(channels * share), dim=3).indices
        mask = torch.zeros_like(scores).scatter(3, largest, 1.0)
        y = y + weight * (torch.where(mask > 0, scores, -torch.inf).softmax(3) @ v)
    return F.conv2d(y.reshape(batch, width, height, across), layer.out.weight)


def test_parameters_are_those_of_the_release_and_so_are_the_mixtures_of_experts() -> None:
    count = {size: sum(p.numel() for p in meta(size).parameters()) for size in drsformer.PUBLISHED}
    assert count == {"full": 33_655_424, "without-experts": 32_610_304}
    net = meta("full")
    mixtures = [sum(p.numel() for p in part.parameters()) for part in (net.experts_in, net.experts_out)]
    assert mixtures == [230_816, 814_304]
    assert count["full"] - count["without-experts"] == sum(mixtures)


def test_products_are_those_of_the_release_but_for_three_of_four_with_the_values() -> None:
    net = meta("full")
    found = macs_of_shapes(net, {"image": torch.zeros(1, 3, 256, 256, device="meta")})
    assert found == 229_390_234_624
    places = {"down1": 256**2, "down2": 128**2, "down3": 64**2, "bottom": 32**2}
    places |= {"up1": 256**2, "up2": 128**2, "up3": 64**2}
    with_values = sum(
        block.attention.out.in_channels**2 // block.attention.heads * count
        for level, count in places.items()
        for block in net.get_submodule(level)
    )
    assert found + 3 * with_values == pytest.approx(242.98e9, abs=5e6)


def test_levels_have_the_heads_and_ranks_of_the_release() -> None:
    net = meta("full")
    levels = [net.down1, net.down2, net.down3, net.bottom, net.up3, net.up2, net.up1]
    assert [len(level) for level in levels] == [4, 6, 6, 8, 6, 6, 4]
    assert [level[0].attention.heads for level in levels] == [1, 2, 4, 8, 4, 2, 1]
    assert [level[0].attention.kept for level in levels] == [(24, 32, 36, 38)] * 6 + [(48, 64, 72, 76)]
    hidden = [level[0].feed_forward.second3.out_channels for level in levels]
    assert hidden == [127, 255, 510, 1021, 510, 255, 255]


@torch.no_grad()
def test_the_same_weights_give_the_outputs_of_the_release() -> None:
    """Recorded in float64 from cschenxiang/DRSformer at e77bbb4, made as small as ``WHOLE``."""
    place = torch.arange(3 * 24 * 32, dtype=torch.float64)
    image = (0.5 + 0.5 * torch.sin(0.0021 * place * torch.sin(0.013 * place))).float().view(1, 3, 24, 32)
    added = numbered(drsformer.build(WHOLE))(image) - image
    found = torch.cat([added.mean((2, 3))[0], added.std((2, 3))[0], added[0, :, 0, 31], added[0, :, 17, 6]])
    torch.testing.assert_close(found, torch.tensor(RELEASE), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("width", "heads"), [(48, 1), (96, 1), (20, 2)])
def test_one_product_is_the_four_of_the_paper(width: int, heads: int) -> None:
    layer, x = attention(width, heads), torch.randn(2, width, 8, 12)
    wanted = four_products(layer, x)
    assert wanted.std() > 0.05
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", range(4))
def test_each_sparse_attention_keeps_its_share_of_every_row_and_its_weights_add_up_to_one(place: int) -> None:
    layer, scores = attention(48, 1), torch.randn(2, 1, 48, 48)
    layer.blend.copy_(F.one_hot(torch.tensor(place), 4))
    weights = layer.weights(scores)
    kept = (24, 32, 36, 38)[place]
    assert ((weights > 0).sum(3) == kept).all()
    torch.testing.assert_close(weights.sum(3), torch.ones(2, 1, 48))
    assert (weights.gather(3, scores.argsort(dim=3, descending=True)[..., :kept]) > 0).all()  # the largest ones


def test_the_blend_starts_at_a_fifth_for_each_and_every_one_counts() -> None:
    layer = SparseChannelAttention(20, 2)
    assert layer.blend.tolist() == pytest.approx([0.2] * 4)
    scores = torch.randn(1, 2, 10, 10)
    before = layer.weights(scores)
    torch.testing.assert_close(before.sum(3), torch.full((1, 2, 10), 0.8))
    for place in range(4):
        other = SparseChannelAttention(20, 2)
        other.blend.data[place] += 1
        other.blend.data[(place + 1) % 4] -= 1
        assert (other.weights(scores) - before).abs().max() > 0.03


def test_nothing_left_out_is_dense_attention() -> None:
    layer, scores = attention(20, 2), torch.randn(1, 2, 10, 10)
    layer.blend.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert (layer.weights(scores) - scores.softmax(3)).abs().max() > 0.03
    layer.kept = (10, 10, 10, 10)
    layer.ranks.fill_(9)
    torch.testing.assert_close(layer.weights(scores), scores.softmax(3))


def test_scores_that_tie_at_the_threshold_all_stay() -> None:
    layer = attention(48, 1)
    layer.blend.copy_(torch.tensor([1.0, 0, 0, 0]))
    scores = torch.arange(48.0).expand(1, 1, 48, 48).clone()
    scores[..., 23:25] = 24.0  # the 24th and the 25th largest
    assert ((layer.weights(scores) > 0).sum(3) == 25).all()


def test_scores_are_cosines_times_a_temperature_for_each_head() -> None:
    layer, q, k = attention(20, 2), torch.randn(1, 2, 10, 60), torch.randn(1, 2, 10, 60)
    wanted = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=4) * layer.temperature
    torch.testing.assert_close(layer.scores(q, k), wanted, rtol=1e-5, atol=1e-5)
    assert layer.temperature[0] != layer.temperature[1]
    torch.testing.assert_close(layer.scores(100 * q, 0.01 * k), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.scores(0 * q, k), torch.zeros(1, 2, 10, 10))  # a silent channel is like none


def test_half_precision_keeps_scores_and_means_of_a_large_map_in_float32() -> None:
    layer, q, k = attention(20, 2), 30 * torch.randn(1, 2, 10, 40_000), 30 * torch.randn(1, 2, 10, 40_000)
    assert (q.half().square().sum(3)).isinf().all()
    scores = layer.half().scores(q.half(), k.half())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, layer.float().scores(q, k), rtol=0, atol=2e-3)
    mixture, x = MixtureOfExperts(4, 1).half().requires_grad_(False), torch.full((1, 4, 300, 300), 2.0).half()
    found = []
    mixture.router.register_forward_pre_hook(lambda m, inputs: found.append(inputs[0]))
    mixture(x)
    assert torch.equal(found[0], torch.full((1, 4), 2.0).half())


def test_the_norm_is_each_places_own() -> None:
    norm, x = ChannelNorm(8), 3 + 5 * torch.randn(2, 8, 4, 6)
    numbered(norm)
    wanted = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    wanted = wanted * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), wanted, rtol=1e-5, atol=1e-5)


def test_the_feed_forward_exchanges_halves_of_its_two_scales() -> None:
    hidden = 7  # odd, so that the middle pair of channels takes one of each scale
    layer, x = MixedScaleFeedForward(6, hidden), torch.randn(1, 6, 8, 8)
    numbered(layer)
    layer.project_out.weight[:, hidden:] = 0  # of the second layer the 3x3 convolution alone
    before = layer(x)
    for first in (layer.first3, layer.first5):
        saved = first.weight.clone()
        first.weight[hidden:] *= -1
        assert torch.equal(layer(x), before)
        first.weight.copy_(saved)
        first.weight[:hidden] *= -1
        assert (layer(x) - before).abs().max() > 0.1
        first.weight.copy_(saved)
    y = layer.project_in(x)
    wide = F.relu(F.conv2d(y, layer.first5.weight, padding=2, groups=2 * hidden))
    narrow = F.relu(F.conv2d(y, layer.first3.weight, padding=1, groups=2 * hidden))
    pairs = torch.cat([narrow[:, :hidden], wide[:, :hidden]], dim=1)
    y = F.relu(F.conv2d(pairs, layer.second3.weight, padding=1, groups=hidden))
    torch.testing.assert_close(before, F.conv2d(y, layer.project_out.weight[:, :hidden]))


def test_an_expert_is_weighed_alone_and_its_step_adds_to_what_it_reads() -> None:
    step, x = ExpertStep(4), torch.randn(2, 4, 9, 9).abs()
    numbered(step)
    for place, expert in enumerate(step.experts):
        weights = torch.zeros(2, 8)
        weights[0, place], weights[1, place] = 0.7, -0.4
        y = F.conv2d(weights[:, place, None, None, None] * expert(x), step.join.weight[:, 4 * place : 4 * place + 4])
        assert y.std() > 0.03
        torch.testing.assert_close(step(x, weights), (y.relu() + x).relu(), rtol=1e-5, atol=1e-5)


def test_the_experts_see_as_far_as_their_kernels() -> None:
    step, seen = ExpertStep(1), []
    x = torch.zeros(1, 1, 33, 33, requires_grad=True)
    for expert in step.experts:
        for weight in expert.parameters():
            nn.init.ones_(weight)
        (reached,) = torch.autograd.grad(expert(x + 1)[0, 0, 16, 16], x)
        seen.append((int((reached[0, 0, 16] > 0).sum()), int((reached[0, 0, 16] > 0).nonzero().max()) - 16))
    assert seen == [(1, 0), (5, 2), (9, 4), (13, 6), (3, 2), (5, 4), (7, 6), (3, 1)]
    flat = torch.ones(1, 1, 5, 5)
    assert torch.equal(step.experts[7](flat), flat)  # the mean leaves out what lies beyond the border


def test_the_router_weighs_the_experts_of_each_step_by_the_mean_of_the_picture() -> None:
    mixture, x, given = MixtureOfExperts(4, 3), torch.randn(2, 4, 8, 8), []
    numbered(mixture)
    for step in mixture.steps:
        step.register_forward_pre_hook(lambda m, inputs: given.append(inputs[1]))
    mixture(x)
    one, _, two = mixture.router
    logits = F.linear(F.linear(x.mean((2, 3)), one.weight, one.bias).relu(), two.weight, two.bias)
    torch.testing.assert_close(torch.stack(given, dim=1), logits.view(2, 3, 8).softmax(2))
    assert (given[0] - given[1]).abs().max() > 0.03
    assert one.out_features == 48


@torch.no_grad()
def test_a_silent_last_convolution_leaves_the_picture_as_it_is() -> None:
    net, image = numbered(drsformer.build(WHOLE)), torch.rand(1, 3, 16, 24)
    assert (net(image) - image).std() > 0.1
    net.output.weight.zero_()
    assert torch.equal(net(image), image)


SIDES = {2: ("height", 16, 64, 8), 3: ("width", 16, 64, 8)}


@pytest.mark.parametrize(
    ("sides", "shapes"),
    [
        ({}, ((1, 32, 32), (3, 32, 32), (4, 32, 32))),
        pytest.param(SIDES, ((1, 16, 16), (1, 32, 32), (3, 24, 40), (4, 64, 64)), marks=pytest.mark.slow),
    ],
    ids=["one size", "any size"],
)
def test_the_onnx_file_derains_pictures(sides: dict[int, Any], shapes: tuple[Any, ...], tmp_path: Path) -> None:
    net, path = numbered(drsformer.build(TINY)), tmp_path / "m.onnx"
    dynamic = {"image": {0: ("batch", 1, 4), **sides}}
    export_onnx(net, {"image": torch.rand(2, 3, 32, 32)}, dynamic=dynamic, outputs=drsformer.OUTPUTS, path=path)
    for shape in shapes:
        image = torch.rand(shape[0], 3, *shape[1:])
        wanted = net(image)
        assert (wanted - image).std() > 0.1
        torch.testing.assert_close(in_onnxruntime(path, {"image": image}), wanted, rtol=1e-4, atol=1e-3)
    nodes = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    assert nodes["TopK"] == 2  # one for each block
    assert nodes["MatMul"] == 4
    assert not nodes["ScatterElements"]
