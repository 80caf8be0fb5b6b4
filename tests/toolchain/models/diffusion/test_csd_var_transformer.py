from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from enginewright.models.diffusion.csd_var import transformer
from enginewright.models.diffusion.csd_var.scales import FROM_CONTENT, starts
from enginewright.models.diffusion.csd_var.transformer import Config, Memories, Transformer
from enginewright.passes.traits import FusedAttention
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.pytorch_engine import EagerRunner

TINY = transformer.TINY
PLACES = starts(TINY.scales)
RELEASED_SIZES = dataclasses.replace(TINY, width=64, heads=4, context=2048, pooled=1280)
"""The tiny size with the width of text that the authors' code asks for."""
RELEASE = {
    (True, "none"): (-0.58149, -1.07419, 0.76882, 2.37421, -0.32767, -0.67209),
    (True, "kept"): (-0.64237, -1.06579, 0.85148, 2.67456, -0.34829, -0.76059),
    (False, "apart"): (-0.64237, -1.0578, 1.16735, 2.79865, -0.16198, -0.80188),
    (True, "released"): (-0.77549, -1.21397, 0.85118, 2.86505, -0.36637, -0.82924),
}
"""Logits at a few places, by whether scales see earlier ones and by memories."""


def config_with(memories: Memories, *, sees_earlier: bool = True) -> Config:
    return dataclasses.replace(TINY, memories=memories, sees_earlier=sees_earlier)


def loud(config: Config = TINY) -> Transformer:
    """A transformer whose weights are so large that every mechanism speaks up."""
    net = Transformer(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(net.named_parameters()):
            spread = 0.3 if "norm" in name else 1.2 if name == "memory" else 1.5 / weight.shape[-1] ** 0.5
            weight.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
        net.crop_embed.weight.mul_(0.01)
    return net.requires_grad_(False)


def call(config: Config = TINY, *, rows: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    mask = torch.ones(rows, config.text, dtype=torch.bool)
    mask[0, 4:] = False
    return {
        "features": drawn(config.tokens, config.channels),
        "pooled": drawn(config.pooled),
        "crop": torch.tensor([512.0, 640.0, 0.0, 64.0]).expand(rows, 4),
        "context": drawn(config.text, config.context),
        "mask": mask,
    }


def in_steps(net: Transformer, given: dict[str, Tensor]) -> Tensor:
    """Logits of all scales, one after the other, over a cache that is full of noise where nothing was written."""
    config, rows = net.config, len(given["mask"])
    shape = (rows, config.depth, config.heads, config.tokens, config.head_dim)
    cache = (torch.randn(shape), torch.randn(shape)) if config.sees_earlier else None
    text = {name: given[name] for name in ("pooled", "crop", "context", "mask")}
    found = []
    places = starts(config.scales)
    for begin, end in pairwise(places):
        step = net.step(given["features"][:, begin:end], torch.tensor(begin), **text, cache=cache)
        for kept, new in zip(cache or (), step[1:], strict=False):
            kept[..., begin:end, :] = new
        found.append(step[0])
    return torch.cat(found, dim=1)


def effect(one: Tensor, other: Tensor) -> Tensor:
    """How far each scale's logits are apart, on average: (S,)."""
    apart = (one - other).abs().mean((0, 2))
    return torch.stack([apart[a:b].mean() for a, b in pairwise(PLACES)])


def count(config: Config) -> tuple[int, int]:
    """Parameters of all, and of the blocks."""
    with torch.device("meta"):
        net = Transformer(config)
    return sum(p.numel() for p in net.parameters()), sum(p.numel() for p in net.blocks.parameters())


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("csd-var", 2_470_518_256 + 4 * 1920),
        ("switti-ar", 2_470_518_256),
        ("switti", 2_470_518_256),
        ("switti-1024", 2_470_518_256 + 4 * 1920),  # four more scales, and their embeddings
    ],
)
def test_parameters_are_those_of_the_release_and_the_memories(size: str, total: int) -> None:
    assert count(transformer.PUBLISHED[size]) == (total, 2_449_040_640)
    assert transformer.PUBLISHED[size].tokens == (9451 if size == "switti-1024" else 2240)


@pytest.mark.parametrize(
    ("depth", "total", "millions"), [(16, 411_701_376, 411.7), (20, 772_632_736, 772.6), (24, 1_299_693_760, 1299.7)]
)
def test_smaller_widths_have_the_counted_parameters(depth: int, total: int, millions: float) -> None:
    found, _ = count(Config(depth=depth, width=64 * depth, heads=depth))
    assert found == total
    assert round(found / 1e6, 1) == millions


def wave(*shape: int) -> Tensor:
    place = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.37 * place + 0.003 * place**2).float().view(shape)


@torch.no_grad()
@pytest.mark.parametrize(("sees_earlier", "memories"), list(RELEASE))
def test_the_same_weights_give_the_logits_of_the_release(sees_earlier: bool, memories: Memories) -> None:
    """Recorded in float64 from yandex-research/switti at 3b286b5, with CSD-VAR's attention, masks and drawing."""
    config = dataclasses.replace(RELEASED_SIZES, sees_earlier=sees_earlier, memories=memories)
    net = Transformer(config).eval()
    for index, (_, weight) in enumerate(sorted((n, w) for n, w in net.named_parameters() if n != "memory")):
        place = torch.arange(weight.numel(), dtype=torch.float64)
        spread = 1.5 * weight.shape[1] ** -0.5 if weight.dim() == 2 else 0.7
        weight.copy_((spread * torch.sin(1.7 * place + 0.01 * place**2 + index)).view(weight.shape))
    if memories != "none":
        net.memory.copy_(2 * wave(2, 2, 64))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    logits = net(
        features=wave(2, 55, 8),
        pooled=wave(2, 1280),
        crop=torch.tensor([[512.0, 512, 0, 0], [640, 512, 64, 0]]),
        context=wave(2, 7, 2048),
        mask=mask,
    )
    rows, tokens, codes = torch.tensor([[0, 0, 3], [0, 2, 5], [1, 9, 11], [0, 20, 0], [1, 40, 63], [1, 54, 7]]).T
    wanted = torch.tensor(RELEASE[sees_earlier, memories])
    torch.testing.assert_close(logits[rows, tokens, codes], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sees_earlier", [True, False])
@pytest.mark.parametrize("memories", ["none", "apart", "kept", "released", "style", "content"])
def test_scale_after_scale_over_a_cache_gives_what_one_masked_pass_gives(
    memories: Memories, sees_earlier: bool
) -> None:
    net = loud(config_with(memories, sees_earlier=sees_earlier))
    whole = net(**call())
    assert whole.std() > 0.5
    torch.testing.assert_close(in_steps(net, call()), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sees_earlier", "memories", "by_scale"),
    [
        (True, "none", [(0, 0)] * 5),
        (True, "apart", [(1, 0)] * 3 + [(0, 1)] * 2),
        (True, "kept", [(1, 0)] * 3 + [(1, 1)] * 2),
        (True, "released", [(1, 1)] * 3 + [(2, 2)] * 2),
        (True, "style", [(1, 0)] * 5),
        (True, "content", [(0, 0)] * 3 + [(0, 1)] * 2),
        (False, "kept", [(1, 0)] * 3 + [(0, 1)] * 2),
        (False, "apart", [(1, 0)] * 3 + [(0, 1)] * 2),
        (False, "released", [(1, 1), (0, 0), (0, 0), (1, 1), (0, 0)]),
        (False, "style", [(1, 0)] + [(0, 0)] * 4),
        (False, "content", [(0, 0)] * 3 + [(0, 1), (0, 0)]),
    ],
)
def test_how_often_a_scale_sees_each_memory(
    sees_earlier: bool, memories: Memories, by_scale: list[tuple[int, int]]
) -> None:
    seen = transformer.times_seen(config_with(memories, sees_earlier=sees_earlier))
    assert [tuple(row) for row in seen[PLACES[:-1]].int().tolist()] == by_scale
    assert seen.shape == (TINY.tokens, 2)


def test_memories_move_the_scales_that_see_them_and_no_others() -> None:
    """Weights are the same; so are all logits of scales that see the same."""
    runs = {}
    for memories in ("none", "apart", "kept", "released", "content"):
        net = loud(config_with(memories))
        if memories != "none":
            net.load_state_dict({**loud(config_with("none")).state_dict(), "memory": net.memory}, strict=True)
        runs[memories] = net(**call())
    assert effect(runs["none"], runs["kept"]).min() > 0.005
    kept_or_apart = effect(runs["kept"], runs["apart"])
    assert torch.equal(kept_or_apart[:FROM_CONTENT], torch.zeros(3))
    assert kept_or_apart[FROM_CONTENT:].min() > 0.005
    assert effect(runs["kept"], runs["released"]).min() > 0.005
    content = effect(runs["none"], runs["content"])
    assert torch.equal(content[:FROM_CONTENT], torch.zeros(3))
    assert content[FROM_CONTENT:].min() > 0.005


def test_a_key_that_is_seen_twice_is_two_keys() -> None:
    q, k, v, own = (torch.randn(2, 3, length, 4) for length in (5, 1, 1, 5))
    twice = transformer.attend(q, [(k, v, torch.full((5, 1), 2.0).log()), (own, own, None)])
    doubled = transformer.attend(q, [(k.expand(2, 3, 2, 4), v.expand(2, 3, 2, 4), None), (own, own, None)])
    torch.testing.assert_close(twice, doubled)
    assert (twice - transformer.attend(q, [(k, v, None), (own, own, None)])).abs().max() > 0.01


@pytest.mark.parametrize("sees_earlier", [True, False])
def test_a_scale_sees_itself_and_the_ones_before_it_or_itself_alone(sees_earlier: bool) -> None:
    net = loud(config_with("none", sees_earlier=sees_earlier))
    other = call()
    other["features"][:, PLACES[2] : PLACES[3]] += 1
    moved = effect(net(**call()), net(**other)) > 1e-3
    assert moved.tolist() == [False, False, True, sees_earlier, sees_earlier]


@pytest.mark.parametrize("name", ["pooled", "crop", "context", "mask"])
def test_every_part_of_the_text_and_the_crop_is_read(name: str) -> None:
    net, other = loud(), call()
    other[name] = ~other[name] if name == "mask" else other[name].roll(1, -1)
    assert effect(net(**call()), net(**other)).min() > 0.005


def test_padding_of_the_text_is_not_read_and_neither_is_the_first_feature() -> None:
    net, other = loud(), call()
    other["context"][0, 4:] += 3
    other["features"][:, 0] += 3
    torch.testing.assert_close(net(**other), net(**call()))


def test_places_turn_pairs_of_neighbours_by_column_then_by_row() -> None:
    config = dataclasses.replace(TINY, width=16, heads=2, scales=(1, 3))  # heads of 8: two rates, two axes
    cos, sin = transformer.axial_angles(config)
    angles = torch.atan2(sin.double(), cos.double())
    rates = torch.tensor([1.0, 0.01], dtype=torch.float64)
    for slot, column, row in ((0, 0, 0), (1, 0, 0), (3, 128, 0), (4, 0, 64), (5, 64, 64), (9, 128, 128)):
        wanted = torch.cat([column * rates, row * rates])
        torch.testing.assert_close((angles[slot] - wanted).cos(), torch.ones(4, dtype=torch.float64))
    x = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0]).view(1, 1, 1, 8)
    quarter = torch.tensor([[math.pi / 2, math.pi / 2, 0, 0]])
    turned = transformer.turn(x, (quarter.cos(), quarter.sin()))[0, 0, 0]
    torch.testing.assert_close(turned, torch.tensor([0.0, 1, -1, 0, 0, 0, 0, 0]))


def test_places_and_scales_matter() -> None:
    given, net = call(), loud()
    for buffer in ("sin", "scale"):
        other = loud()
        getattr(other, buffer).mul_(0)
        assert effect(net(**given), other(**given))[1:].min() > 0.02, buffer


def test_queries_and_keys_are_normed_over_all_heads() -> None:
    """So that no head can be taken out alone, and none says that it can."""
    net = loud()
    whole = net(**call())
    net.blocks[0].attn.to_qkv.weight[: 2 * TINY.width] *= 3
    net.blocks[0].attn.to_qkv.bias[: 2 * TINY.width] *= 3
    torch.testing.assert_close(net(**call()), whole, rtol=1e-3, atol=1e-3)
    net.blocks[0].attn.to_qkv.weight[:4] *= 3
    assert (net(**call()) - whole).abs().max() > 0.05
    assert not isinstance(net.blocks[0].attn, FusedAttention)


def test_crop_sizes_become_sines_and_cosines_of_the_same_angles() -> None:
    layer = transformer.FourierFeatures(3)
    sizes = torch.tensor([[512.0, 640.0, 0.0, 64.0]])
    angle = 2 * math.pi * sizes[0].double()[:, None] * layer.weight.detach().double()  # (4, 3)
    wanted = torch.cat([angle.sin(), angle.cos()], dim=1).flatten()
    torch.testing.assert_close(layer(sizes)[0].detach().double(), wanted, rtol=0, atol=1e-3)


def arrays_of(given: dict[str, Tensor], scale: int) -> dict[str, np.ndarray]:
    scale_of = slice(PLACES[scale], PLACES[scale + 1])
    own = {**given, "features": given["features"][:, scale_of], "position": torch.tensor(PLACES[scale])}
    return {name: value.numpy() for name, value in own.items()}


def test_the_program_that_becomes_an_engine_draws_what_the_whole_form_does() -> None:
    program = transformer.build(TINY).eval()
    net = program.networks["model"].transformer
    net.load_state_dict(loud().state_dict())
    runner = EagerRunner(program, threads=1, outputs=transformer.OUTPUTS)
    whole = net(**call())
    for _ in range(2):  # a run starts anew
        found = [runner(arrays_of(call(), scale))["logits"] for scale in range(5)]
        torch.testing.assert_close(torch.from_numpy(np.concatenate(found, axis=1)), whole, rtol=1e-5, atol=1e-5)


def test_a_base_without_cache_is_one_network() -> None:
    config = config_with("kept", sees_earlier=False)
    net = transformer.build(config)
    assert isinstance(net, transformer.ScaleTransformer)
    net.transformer.load_state_dict(loud(config).state_dict())
    given = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays_of(call(), 3).items()}
    wanted = net.transformer(**call())[:, PLACES[3] : PLACES[4]]
    torch.testing.assert_close(net.eval()(**given), wanted, rtol=1e-5, atol=1e-5)


def test_the_graph_gives_what_pytorch_gives_at_two_scales_and_batches(tmp_path: Path) -> None:
    import onnxruntime

    net = transformer.CachedTransformer(TINY).eval()
    net.transformer.load_state_dict(loud().state_dict())

    def given(rows: int, scale: int) -> dict[str, Tensor]:
        shape = (rows, TINY.depth, TINY.heads, TINY.tokens, TINY.head_dim)
        cache = torch.Generator().manual_seed(scale)
        arrays = arrays_of(call(rows=rows), scale)
        return {
            **{name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()},
            "keys": torch.randn(shape, generator=cache),
            "values": torch.randn(shape, generator=cache),
        }

    example, path = given(2, 2), tmp_path / "model.onnx"
    dynamic = {name: {0: ("batch", 1, 8)} for name in example if name != "position"}
    dynamic["features"][1] = ("tokens", 1, 25)
    export_onnx(net, example, dynamic=dynamic, outputs=["logits", "new_keys", "new_values"], path=path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows, scale in ((1, 1), (3, 4)):
        tried = given(rows, scale)
        with torch.no_grad():
            wanted = net(**tried)
        found = session.run(None, {name: tensor.numpy() for name, tensor in tried.items()})
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)


def test_the_calls_of_a_run_go_from_scale_to_scale_with_one_text() -> None:
    calls = transformer.realistic(transformer.build(TINY), "tiny", TINY)(7, 0)
    assert [(each["features"].shape[1], int(each["position"])) for each in calls] == [
        (1, 0), (4, 1), (9, 5), (16, 14), (25, 30), (1, 0), (4, 1)
    ]  # fmt: skip
    assert np.array_equal(calls[0]["context"], calls[4]["context"])
    assert not np.array_equal(calls[0]["context"], calls[5]["context"])
    assert calls[0]["crop"][0].tolist() == [512, 512, 0, 0]
