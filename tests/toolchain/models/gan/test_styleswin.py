from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.models.gan import styleswin
from enginewright.passes.contract import macs, macs_of_shapes
from enginewright.passes.networks import lacks_values

TINY = styleswin.TINY
RELEASE = (
    *(-10.31854, -0.44437, -4.70878),  # mean of each colour
    *(2.85268, 2.23398, 4.12125),  # deviation of each colour
    *(-6.72451, 2.07613, -3.70618),  # colours at row 0, column 15
    *(-11.5052, -4.65965, -6.88236),  # colours at row 9, column 6
)


def meta(module: type[nn.Module], size: str) -> nn.Module:
    with torch.device("meta"):
        return module(styleswin.PUBLISHED[size])


def loud(network: nn.Module) -> nn.Module:
    """The network with weights so large that every mechanism speaks up."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith(("attn.bias", "alpha")):
                weight.normal_()
            elif weight.dim() == 2:
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
            elif "norm" not in name:
                weight.normal_(std=0.3)
    return network.eval().requires_grad_(False)


def numbered(network: nn.Module) -> nn.Module:
    """The network with weights that follow from their number alone, on any machine."""
    for index, weight in enumerate(network.parameters()):
        count = torch.arange(weight.numel(), dtype=torch.float64)
        spread = 1.5 * weight.shape[1] ** -0.5 if weight.dim() == 2 else 0.7
        weight.copy_((spread * torch.sin(1.7 * count + 0.01 * count**2 + index)).view(weight.shape))
    return network.eval()


def layer(side: int, *, width: int = 32, window: int = 4) -> styleswin.DoubleAttention:
    torch.manual_seed(0)
    attention = styleswin.DoubleAttention(width, side, window)
    loud(attention)
    nn.init.normal_(attention.bias)
    return attention


def tokens(side: int, *, width: int = 32, batch: int = 2) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, side * side, width)


def keep_half(attention: styleswin.DoubleAttention, *, plain: bool) -> None:
    """Silence the output of the other half of the heads."""
    width = attention.proj.in_features
    attention.proj.weight[:, slice(width // 2, None) if plain else slice(0, width // 2)] = 0


def moved(network: nn.Module, x: Tensor, place: tuple[int, int]) -> Tensor:
    """Where the output moves by more than rounding when the token at ``place`` (row, column) changes: (S, S)."""
    side = int(x.shape[1] ** 0.5)
    changed = x.clone()
    changed[:, place[0] * side + place[1]] += 3 * torch.randn(x.shape[2])
    return ((network(changed) - network(x)).abs().amax((0, 2)) > 1e-5).view(side, side)


def box(side: int, rows: slice, columns: slice) -> Tensor:
    found = torch.zeros(side, side, dtype=torch.bool)
    found[rows, columns] = True
    return found


def stored_masks(side: int, window: int, shift: int) -> Tensor:
    """One mask for each window of a rolled map, made by labelling the map: (windows, V, V)."""
    labels = torch.zeros(side, side)
    bands = (slice(0, side - window), slice(side - window, side - shift), slice(side - shift, side))
    for number, (rows, columns) in enumerate((r, c) for r in bands for c in bands):
        labels[rows, columns] = number
    n = side // window
    cut = labels.view(n, window, n, window).transpose(1, 2).reshape(n * n, window * window)
    return -100.0 * (cut[:, :, None] != cut[:, None]).float()


@pytest.mark.parametrize(
    ("size", "side", "latents", "count"), [("256", 256, 14, 48_929_512), ("1024", 1024, 18, 40_862_990)]
)
def test_parameters_are_those_of_the_release(size: str, side: int, latents: int, count: int) -> None:
    config = styleswin.PUBLISHED[size]
    networks = meta(styleswin.Mapping, size), meta(styleswin.Synthesis, size)
    assert sum(p.numel() for network in networks for p in network.parameters()) == count
    assert (config.side, config.latents) == (side, latents)


def test_all_products_at_1024_are_a_little_more_than_the_paper_counts() -> None:
    found = macs_of_shapes(meta(styleswin.Synthesis, "1024"), {"ws": torch.zeros(1, 18, 512, device="meta")})
    assert found == 52_480_605_184
    assert found == pytest.approx(50.90e9, rel=0.04)


@torch.no_grad()
def test_the_same_weights_give_the_outputs_of_the_release() -> None:
    """Recorded in float64 from microsoft/StyleSwin at a7c28b3, its widths and window set to those of the tiny size."""
    mapping, synthesis = numbered(styleswin.Mapping(TINY)), numbered(styleswin.Synthesis(TINY))
    ws = mapping(torch.linspace(-2, 2, 32)[None] ** 3)
    image = synthesis(ws * torch.linspace(0.5, 1.5, 6)[:, None])
    found = torch.cat([image.mean((2, 3))[0], image.std((2, 3))[0], image[0, :, 0, 15], image[0, :, 9, 6]])
    torch.testing.assert_close(found, torch.tensor(RELEASE), rtol=0, atol=2e-4)


def test_the_constants_of_1024_stay_under_a_megabyte() -> None:
    network = meta(styleswin.Synthesis, "1024")
    assert 0 < sum(b.numel() * b.element_size() for b in network.buffers()) < 300_000
    assert not set(network.state_dict()) & {name for name, _ in network.named_buffers()}


def test_heads_are_of_width_32_but_at_least_four() -> None:
    network = meta(styleswin.Synthesis, "1024")
    heads = [(stage.first.attn.heads, stage.second.attn.head_dim) for stage in network.stages]
    assert heads == [(16, 32)] * 4 + [(8, 32), (4, 32), (4, 16), (4, 8), (4, 4)]


def test_maps_no_larger_than_a_window_are_not_shifted() -> None:
    for size in styleswin.PUBLISHED:
        shifts = [stage.first.attn.shift for stage in meta(styleswin.Synthesis, size).stages]
        assert shifts == [0, 0, *[4] * (len(shifts) - 2)]
    assert [stage.first.attn.shift for stage in styleswin.Synthesis(TINY).stages] == [0, 2, 2]
    assert moved(layer(4), tokens(4), (0, 0)).all()


@torch.no_grad()
def test_a_plain_window_sees_no_token_of_another() -> None:
    attention = layer(16)
    keep_half(attention, plain=True)
    assert torch.equal(moved(attention, tokens(16), (5, 9)), box(16, slice(4, 8), slice(8, 12)))


@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [
        ((6, 9), slice(6, 10), slice(6, 10)),
        ((0, 0), slice(0, 2), slice(0, 2)),
        ((1, 15), slice(0, 2), slice(14, 16)),
        ((15, 3), slice(14, 16), slice(2, 6)),
        ((7, 14), slice(6, 10), slice(14, 16)),
    ],
)
@torch.no_grad()
def test_a_shifted_window_lies_between_four_plain_ones_and_ends_at_the_border(
    place: tuple[int, int], rows: slice, columns: slice
) -> None:
    attention = layer(16)
    keep_half(attention, plain=False)
    assert torch.equal(moved(attention, tokens(16), place), box(16, rows, columns))


@torch.no_grad()
def test_without_the_shifted_half_the_shift_changes_nothing() -> None:
    attention, still = layer(8), layer(8)
    still.shift = 0
    x = tokens(8)
    assert (attention(x) - still(x)).abs().max() > 0.1
    for one in (attention, still):
        one.qkv.weight.view(3, 2, 16, 32)[:, 1] = 0
        keep_half(one, plain=True)
    torch.testing.assert_close(attention(x), still(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("side", "window"), [(8, 4), (16, 4), (24, 8)])
def test_of_all_stored_masks_the_four_that_are_distinct_are_made(side: int, window: int) -> None:
    regions = styleswin.regions_of_windows(window, window // 2)
    made = -100.0 * (regions[..., None] != regions[..., None, :]).float()  # (2, 2, V, V)
    last = (torch.arange(side // window) == side // window - 1).long()
    stored = stored_masks(side, window, window // 2)
    assert torch.equal(made[last[:, None], last[None]].flatten(0, 1), stored)
    assert len(stored.unique(dim=0)) == 4


@pytest.mark.parametrize(("side", "window"), [(8, 4), (16, 4), (24, 8)])
@torch.no_grad()
def test_the_shifted_half_gives_the_bits_that_a_mask_for_every_window_gives(side: int, window: int) -> None:
    attention, n = layer(side, window=window), side // window
    qkv = 2 * torch.randn(3, 2, n, n, 2, window * window, 8)
    bias = attention.position_bias()[2:]
    masks = (bias + stored_masks(side, window, window // 2)[:, None]).repeat(2, 1, 1, 1)  # (B*n*n, H/2, V, V)
    q, k, v = qkv.flatten(1, 3)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=masks).view(2, n, n, 2, window * window, 8)
    assert torch.equal(attention.attend_shifted(qkv, bias), wanted)
    assert (styleswin.attend(qkv, bias) - wanted).abs().max() > 0.1


@torch.no_grad()
def test_a_position_bias_depends_on_the_distance_of_query_and_key_alone() -> None:
    attention = layer(8)
    bias = attention.position_bias().view(4, 4, 4, 4, 4)  # head, row and column of the query, of the key
    assert torch.equal(bias[:, 0, 1, 2, 3], attention.bias[:, 0 - 2 + 3, 1 - 3 + 3])
    assert torch.equal(bias[:, 0, 1, 2, 2], bias[:, 1, 2, 3, 3])
    assert not torch.equal(bias[:, 0, 1, 2, 2], bias[:, 2, 2, 0, 1])


@pytest.mark.parametrize("plain", [True, False])
@torch.no_grad()
def test_each_half_of_the_heads_has_its_own_position_bias(plain: bool) -> None:
    attention, x = layer(8), tokens(8)
    keep_half(attention, plain=plain)
    before = attention(x)
    attention.bias[2:] += torch.randn(2, 7, 7)
    assert torch.equal(attention(x), before) is plain
    attention.bias[:2] += torch.randn(2, 7, 7)
    assert (attention(x) - before).abs().max() > 0.1


def test_windows_laid_out_again_are_the_map() -> None:
    attention = layer(16)
    qkv = torch.randn(2, 16, 16, 3, 4, 8)
    cut = attention.cut(qkv)
    assert torch.equal(cut[1, 0, 2, 3, 0, 5], qkv[0, 2 * 4 + 1, 3 * 4 + 1, 1, 0])
    assert torch.equal(attention.join(cut[2]), qkv[:, :, :, 2])


@torch.no_grad()
def test_the_norm_is_each_channels_own_and_the_style_sets_mean_and_spread() -> None:
    norm = styleswin.AdaptiveInstanceNorm(8, 16)
    w = torch.randn(3, 16)
    y = norm(5 + 7 * torch.randn(3, 64, 8), w)
    scale, offset = norm.style(w).chunk(2, dim=1)
    torch.testing.assert_close(y.mean(1), offset, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.std(1, correction=0), scale.abs(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_half_precision_keeps_the_norms_statistics_in_float32() -> None:
    norm = styleswin.AdaptiveInstanceNorm(8, 16)
    x, w = (400 * torch.randn(1, 4096, 8)).half(), torch.randn(1, 16)
    wanted = norm(x.float(), w)
    assert x.square().isinf().any()
    torch.testing.assert_close(norm.half()(x, w.half()).float(), wanted, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_positions_code_the_column_first_and_only_as_far_as_alpha_lets_them() -> None:
    torch.manual_seed(0)
    upsample = styleswin.Upsample(16, 16, 4).requires_grad_(False)
    x = torch.randn(2, 16, 16)
    silent = upsample(x)
    upsample.code += 1
    assert torch.equal(upsample(x), silent)
    upsample.code -= 1
    upsample.alpha.fill_(2)
    grid = (upsample(x) - silent).view(2, 8, 8, 16)
    column, row = grid[0, 0, :, :8], grid[0, :, 0, 8:]
    torch.testing.assert_close(grid, torch.cat([column.expand(2, 8, 8, 8), row[:, None].expand(2, 8, 8, 8)], 3))
    assert column[0, 0].item() == pytest.approx(2 * 0.841471, abs=1e-5)  # sin(1): places start at 1
    assert column[2, 7].item() == pytest.approx(2 * 1.0, abs=1e-5)  # cos(3 / 10000)


@torch.no_grad()
def test_a_linear_ramp_stays_one_when_a_map_doubles() -> None:
    upsample = styleswin.Upsample(8, 8, 4)
    upsample.norm, upsample.reduction = nn.Identity(), nn.Identity()
    ramp = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 4, 4, 8).reshape(1, 16, 8)
    doubled = upsample(ramp).view(8, 8, 8)[3, :, 0]
    assert doubled.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


@torch.no_grad()
def test_the_picture_doubles_by_zeros_between_pixels_and_a_filter() -> None:
    to_rgb = styleswin.ToRGB(8, 12, doubles=True)
    nn.init.zeros_(to_rgb.linear.weight)
    nn.init.zeros_(to_rgb.linear.bias)
    image = torch.randn(2, 3, 6, 6)
    spread = torch.zeros(2, 3, 12, 12)
    spread[:, :, ::2, ::2] = image
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = 4 * torch.outer(line, line).expand(3, 1, 4, 4)
    wanted = F.conv2d(F.pad(spread, (2, 1, 2, 1)), kernel, groups=3)
    torch.testing.assert_close(to_rgb(torch.randn(2, 144, 8), image), wanted)


def test_the_first_picture_is_of_side_8_and_the_last_two_are_whole() -> None:
    network, sides = styleswin.Synthesis(TINY), []
    for stage in network.stages:
        stage.to_rgb.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    network(torch.randn(1, 6, 32))
    assert sides == [8, 16, 16]
    assert [stage.to_rgb.doubles for stage in network.stages] == [True, True, False]


def test_every_block_has_a_style_of_its_own() -> None:
    network = loud(styleswin.Synthesis(TINY))
    ws = torch.randn(2, 6, 32)
    before = network(ws)
    for index in range(6):
        changed = ws.clone()
        changed[:, index] = torch.randn(32)
        assert (network(changed) - before).abs().max() > 0.1, index


@torch.no_grad()
def test_truncation_pulls_a_style_towards_the_mean_that_was_measured() -> None:
    torch.manual_seed(0)
    full = styleswin.Mapping(TINY)
    z, many = torch.randn(3, 32), torch.randn(500, 32)
    assert torch.equal(full(z), full.style(z)[:, None].expand(3, 6, 32))
    full.measure_mean(many)
    torch.testing.assert_close(full.w_mean, full.style(many).mean(0))
    assert torch.equal(full(z)[:, 5], full.style(z))
    half = styleswin.Mapping(dataclasses.replace(TINY, psi=0.5))
    half.load_state_dict(full.state_dict())
    torch.testing.assert_close(half(z), (full(z) + full.w_mean) / 2)
    assert (half(z) - full(z)).abs().max() > 0.1


@torch.no_grad()
def test_the_length_of_a_latent_does_not_matter_and_styles_start_at_unit_size() -> None:
    torch.manual_seed(0)
    mapping = styleswin.Mapping(styleswin.Config(widths=(32,)))
    z = torch.randn(4, 512)
    torch.testing.assert_close(mapping(100 * z), mapping(z), rtol=1e-3, atol=1e-4)
    assert 0.5 < mapping(z).square().mean().sqrt() < 2


@torch.no_grad()
def test_the_exported_synthesis_draws_any_number_of_pictures() -> None:
    network = loud(styleswin.Synthesis(TINY))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network, (torch.randn(2, 6, 32),), dynamic_shapes=({0: batch},), strict=False)
    for count in (1, 3, 8):
        ws = torch.randn(count, 6, 32)
        wanted = network(ws)
        assert wanted.std() > 0.5
        torch.testing.assert_close(exported.module()(ws), wanted)


def test_products_of_both_networks_are_counted_on_shapes_alone() -> None:
    network, seen = styleswin.build(TINY).eval(), []
    hook = network.networks["synthesis"].register_forward_pre_hook(
        lambda _, args, given: seen.append(lacks_values(given["ws"]) or not given["ws"].any()), with_kwargs=True
    )
    found = macs(network, {"z": torch.randn(1, 32)})
    assert seen
    assert all(seen), "styles were computed"
    hook.remove()
    mapping = 2 * 32 * 32
    assert found == mapping + macs(styleswin.Synthesis(TINY).eval(), {"ws": torch.zeros(1, 6, 32)})
