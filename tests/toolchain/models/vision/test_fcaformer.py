from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from enginewright import sources
from enginewright.models.blocks.transformer import bias_by_distance
from enginewright.models.vision import fcaformer
from enginewright.models.vision.fcaformer import TINY, FcaBlock, FcaFormer, FcaStage, ForwardCrossAttention, NormedConv
from enginewright.passes.contract import macs_of_shapes
from enginewright.targets.onnx_export import export_onnx
from tests.engines import in_onnxruntime

RELEASE = (3.971937, 1.779461, -1.009343, 2.255572, 2.460687, -2.316751, 0.31855, -0.124669, 0.90746, -0.255096)


def meta(size: str) -> FcaFormer:
    with torch.device("meta"):
        return fcaformer.build(fcaformer.PUBLISHED[size]).eval()


def values(net: nn.Module) -> dict[str, Tensor]:
    """All that a checkpoint would bring: parameters, and the statistics of batch norms."""
    return {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}


def loud(net: nn.Module) -> nn.Module:
    """The network with weights so large that every mechanism speaks up."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in values(net).items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            else:
                spread = 1.5 * value[0].numel() ** -0.5 if value.dim() > 1 and "bias" not in name else 0.7
                value.copy_(spread * torch.randn(value.shape, generator=generator))
    return net.eval().requires_grad_(False)


def numbered(net: nn.Module) -> nn.Module:
    """The network with weights that follow from their number alone, on any machine."""
    for index, (name, value) in enumerate(values(net).items()):
        count = torch.arange(value.numel(), dtype=torch.float64)
        wave = torch.sin(1.7 * count + 0.37 * count**2 + index).view(value.shape)
        loudness = 6 if value.dim() == 4 else 3  # of convolutions, or pictures would look alike behind the batch norms
        if name.endswith("running_var"):
            value.copy_(1 + 0.5 * wave)
        elif "_bias" in name:
            value.copy_(3 * wave)
        else:
            value.copy_((loudness * value[0].numel() ** -0.5 if value.dim() > 1 else 0.7) * wave)
    return net.eval()


def attention(summaries: int, *, side: int = 3, width: int = 16, heads: int = 2) -> ForwardCrossAttention:
    layer = ForwardCrossAttention(width, heads, side, summaries=summaries)
    loud(layer)
    return layer


def block(*, is_last: bool = False) -> FcaBlock:
    made = FcaBlock(TINY, 16, 2, 6, summaries=8, is_last=is_last)
    loud(made)
    return made


@pytest.mark.parametrize(
    ("size", "count"), [("L1", 6_187_560), ("L2", 16_275_870), ("L3", 27_894_484), ("L4", 65_638_204)]
)
def test_parameters_are_those_of_the_release(size: str, count: int) -> None:
    assert sum(p.numel() for p in meta(size).parameters()) == count


@pytest.mark.parametrize(
    ("size", "count", "of_the_release"), [("L1", 1_365_040_320, 1.374e9), ("L4", 14_207_888_896, 14.492e9)]
)
def test_products_are_those_of_the_release_but_for_the_queries_that_it_drops(
    size: str, count: int, of_the_release: float
) -> None:
    config = fcaformer.PUBLISHED[size]
    found = macs_of_shapes(meta(size), {"image": torch.zeros(1, 3, 224, 224, device="meta")})
    assert found == count
    summaries = [each * n * (n - 1) // 2 for each, n in zip((16, 4), config.depths[2:], strict=True)]
    queries = sum(n * width**2 for n, width in zip(summaries, config.widths[2:], strict=True))
    assert found + queries == pytest.approx(of_the_release, abs=0.5e6)


@torch.no_grad()
def test_the_same_weights_give_the_outputs_of_the_release() -> None:
    """Recorded in float64 from hkzhang-git/FcaFormer at 7dcd8e0, its widths, depths and side set to the tiny size's."""
    place = torch.arange(3 * 96 * 96, dtype=torch.float64)
    image = 3 * torch.sin(0.0021 * place * torch.sin(0.013 * place)).float().view(1, 3, 96, 96)
    found = numbered(fcaformer.build(TINY))(image)
    torch.testing.assert_close(found[0], torch.tensor(RELEASE), rtol=0, atol=1e-4)


def test_keys_grow_by_the_summary_tokens_of_each_block() -> None:
    net, read = meta("L1"), []
    for stage in (net.stage3, net.stage4):
        for each in stage.blocks:
            for layer in (each.cross_attention.q, each.cross_attention.kv):
                layer.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].shape[1]))
    net(torch.zeros(1, 3, 224, 224, device="meta"))
    assert read[::2] == [196] * 6 + [49] * 2
    assert read[1::2] == [196, 212, 228, 244, 260, 276, 49, 53]


def test_attention_reads_the_newest_summaries_and_no_more_than_its_reach() -> None:
    stage, seen, given = loud(FcaStage(replace(TINY, reach=2), 32, 4, 2, 6)), [], []
    for each in stage.blocks:
        each.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[1]))
        each.register_forward_hook(lambda m, inputs, outputs: given.append(outputs[1]))
    stage(torch.randn(2, 36, 32))
    assert seen[0] is None
    assert given[3] is None
    assert torch.equal(seen[1], given[0])
    assert torch.equal(seen[2], torch.cat(given[:2], dim=1))
    assert torch.equal(seen[3], torch.cat(given[1:3], dim=1))  # two blocks back, not three


def test_attention_is_one_softmax_over_tokens_and_summaries_with_a_bias_each() -> None:
    """Written out with one projection of queries, keys and values for both, and an index as large as the mask."""
    layer, x, summaries = attention(4), torch.randn(2, 9, 16), torch.randn(2, 4, 16)
    weight = torch.cat([layer.q.weight, layer.kv.weight])
    bias = torch.cat([layer.q.bias, layer.kv.bias])
    normed = F.layer_norm(summaries * layer.summary_scale, (16,), layer.summary_norm.weight, layer.summary_norm.bias)
    q, k, v = F.linear(x, weight, bias).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    _, k_of_summaries, v_of_summaries = F.linear(normed, weight, bias).view(2, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
    index = torch.tensor([[3 * abs(a // 3 - b // 3) + abs(a % 3 - b % 3) for b in range(9)] for a in range(9)])
    near = q @ k.mT * 8**-0.5 + layer.position_bias.flatten(1)[:, index]
    far = q @ k_of_summaries.mT * 8**-0.5 + layer.summary_bias[:, None]
    mixed = torch.cat([near, far], dim=3).softmax(3) @ torch.cat([v, v_of_summaries], dim=2)
    wanted = layer.proj(mixed.transpose(1, 2).flatten(2))
    assert wanted.std() > 0.3
    torch.testing.assert_close(layer(x, summaries), wanted, rtol=1e-5, atol=1e-5)


def test_the_bias_by_position_is_bit_for_bit_what_an_index_gathers() -> None:
    layer = attention(0, side=5)
    index = torch.tensor([[5 * abs(a // 5 - b // 5) + abs(a % 5 - b % 5) for b in range(25)] for a in range(25)])
    assert torch.equal(bias_by_distance(layer.position_bias, layer.distance), layer.position_bias.flatten(1)[:, index])
    assert not torch.equal(layer.position_bias, layer.position_bias.mT)  # rows and columns are told apart


def test_with_all_summaries_biased_away_plain_attention_is_left() -> None:
    layer, plain, x = attention(4), attention(0), torch.randn(2, 9, 16)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "summary" not in k})
    summaries = torch.randn(2, 4, 16)
    assert (layer(x, summaries) - plain(x, None)).abs().max() > 0.1
    layer.summary_bias.fill_(-torch.inf)
    torch.testing.assert_close(layer(x, summaries), plain(x, None))


def test_a_factor_scales_its_own_summary_before_the_norm() -> None:
    layer, x, summaries = attention(4), torch.randn(2, 9, 16), torch.randn(2, 4, 16)
    layer.summary_scale.fill_(1)
    before = layer(x, summaries)
    layer.summary_scale[2] = -1
    flipped = summaries.clone()
    flipped[:, 2] *= -1
    assert (layer(x, summaries) - before).abs().max() > 0.1
    changed = layer(x, summaries)
    layer.summary_scale[2] = 1
    assert torch.equal(layer(x, flipped), changed)
    layer.summary_scale[2] = 50  # the norm takes a size away, but for its eps
    torch.testing.assert_close(layer(x, summaries), before, rtol=0, atol=1e-4)


def test_summaries_are_taken_before_the_tokens_are_enhanced() -> None:
    one, x, summaries = block(), torch.randn(2, 36, 16), torch.randn(2, 8, 16)
    before, given = one(x, summaries)
    one.enhance[0].weight.mul_(-2)
    after, still = one(x, summaries)
    assert torch.equal(given, still)
    assert (after - before).abs().max() > 0.1
    one.scale1.zero_()
    grid = x.mT.view(2, 16, 6, 6)
    wanted = F.conv2d(grid, one.summarize.weight, stride=4, padding=3, groups=16)  # (2, 16, 2, 2)
    torch.testing.assert_close(one(x, summaries)[1], wanted.flatten(2).mT)


def test_the_enhanced_map_replaces_the_tokens() -> None:
    one, x = block(is_last=True), torch.randn(2, 36, 16)
    one.enhance[0].weight.zero_()
    outputs = [one(tokens, torch.randn(2, 8, 16))[0] for tokens in (x, x + 1)]
    assert torch.equal(*outputs)  # no residual leads past it
    assert outputs[0].std() > 0.3
    assert one.summarize is None


def test_the_feed_forward_norms_twice() -> None:
    one, x = block(is_last=True), torch.randn(2, 36, 16)
    before = one(x, torch.ones(2, 8, 16))[0]
    one.mlp_norm = nn.Identity()
    assert (one(x, torch.ones(2, 8, 16))[0] - before).abs().max() > 0.1
    assert (one.norm2.eps, meta("L1").stage1[0].norm.eps) == (1e-5, 1e-6)


@torch.no_grad()
def test_batch_norms_fold_into_their_convolutions() -> None:
    net, image = loud(fcaformer.build(TINY)), torch.randn(2, 3, 96, 96)
    before = net(image)
    pairs = [module for module in net.modules() if isinstance(module, NormedConv)]
    assert len(pairs) == 2 + 3 * 3 + 3 + 1
    for pair in pairs:
        pair[0], pair[1] = fuse_conv_bn_eval(pair[0], pair[1]), nn.Identity()
    assert before.std() > 0.3
    torch.testing.assert_close(net(image), before, rtol=1e-4, atol=1e-5 * before.abs().max().item())


def test_layer_scales_start_where_the_size_says() -> None:
    for start in (1.0, 1e-6):
        net = fcaformer.build(replace(TINY, layer_scale=start))
        scales = [p for name, p in net.named_parameters() if name.rpartition(".")[2] in ("scale", "scale1", "scale2")]
        assert len(scales) == 2 + 2 * 4
        assert all(torch.equal(scale, torch.full_like(scale, start)) for scale in scales)


@torch.no_grad()
def test_the_logits_of_an_untrained_network_depend_on_the_picture() -> None:
    logits = sources.load("fcaformer:tiny").module(torch.randn(2, 3, 96, 96))
    assert (logits[0] - logits[1]).norm() > 0.03 * logits[0].norm()


def test_the_onnx_file_classifies_any_number_of_pictures(tmp_path: Path) -> None:
    net = loud(fcaformer.build(TINY))
    image = torch.randn(64, 3, 96, 96)
    dynamic = {"image": {0: ("batch", 1, 64)}}
    export_onnx(net, {"image": image[:2]}, dynamic=dynamic, outputs=fcaformer.OUTPUTS, path=tmp_path / "m.onnx")
    for count in (1, 2, 5, 64):
        wanted = net(image[:count])
        assert wanted.std() > 0.3
        found = in_onnxruntime(tmp_path / "m.onnx", {"image": image[:count]})
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
