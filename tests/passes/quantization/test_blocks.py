from __future__ import annotations

import pytest
import torch
from torch import nn

from enginewright.passes.contract import cost
from enginewright.passes.quantization.blocks import E2M1, FORMATS, BlockLinear, Weights, in_blocks, round_to


def test_int4_is_as_by_hand() -> None:
    weight = torch.tensor([[0.7], [-0.26], [0.05], [0.04], [14.0], [-3.0], [0.9], [1.1]])  # (K 8, N 1), 2 blocks
    blocks = in_blocks(weight, "int4", 4)
    torch.testing.assert_close(blocks.scales, torch.tensor([[0.1], [2.0]]))
    assert blocks.codes.flatten().tolist() == [7, -3, 0, 0, 7, -2, 0, 1]
    wanted = torch.tensor([[0.7], [-0.3], [0.0], [0.0], [14.0], [-4.0], [0.0], [2.0]])
    torch.testing.assert_close(blocks.values(), wanted)


def test_every_4_bit_float_is_itself_and_others_go_to_the_nearest() -> None:
    x = torch.linspace(-7, 7, 2001)
    grid = torch.tensor([sign * value for value in E2M1 for sign in (1, -1)])
    assert torch.equal(round_to(grid, "nvfp4"), grid)
    nearest = (x[:, None] - grid).abs().amin(dim=1)
    torch.testing.assert_close((round_to(x, "nvfp4") - x).abs(), nearest)


def test_nvfp4_has_e4m3_scales_under_one_for_all() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 8)
    blocks = in_blocks(weight, "nvfp4", 16)
    assert blocks.scale is not None
    torch.testing.assert_close(blocks.scale, weight.abs().max() / 6 / 448)
    largest = weight.unflatten(0, (2, 16)).abs().amax(dim=1)
    wanted = (largest / 6 / blocks.scale).to(torch.float8_e4m3fn)
    assert torch.equal(blocks.scales.float(), wanted.float())


def test_mxfp8_has_powers_of_two_that_clip_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 8) * torch.logspace(-3, 3, 8)
    blocks = in_blocks(weight, "mxfp8", 32)
    assert torch.equal(blocks.scales.log2(), blocks.scales.log2().round())
    largest = weight.unflatten(0, (2, 32)).abs().amax(dim=1)
    assert (largest <= 448 * blocks.scales).all()
    assert (largest > 223 * blocks.scales).all()


@pytest.mark.parametrize("weights", FORMATS)
def test_blocks_of_zeros_stay_zeros(weights: Weights) -> None:
    assert torch.equal(in_blocks(torch.zeros(32, 4), weights, 16).values(), torch.zeros(32, 4))


@pytest.mark.parametrize(("weights", "worst"), [("int8", 0.01), ("mxfp8", 0.04), ("nvfp4", 0.13), ("int4", 0.13)])
def test_a_layer_computes_with_what_its_codes_stand_for(weights: Weights, worst: float) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(5, 64)
    blocks = in_blocks(linear.weight.detach().T, weights, 16)
    layer = BlockLinear(blocks, weights, linear.bias)
    torch.testing.assert_close(layer(x), x @ blocks.values() + linear.bias)
    with torch.no_grad():
        assert 0 < float((layer(x) - linear(x)).norm() / linear(x).norm()) < worst


def test_a_4_bit_weight_counts_half_a_byte() -> None:
    blocks = in_blocks(torch.randn(64, 32), "int4", 32)
    found = cost(BlockLinear(blocks, "int4", None), None)
    assert found.parameter_count == 64 * 32
    assert found.bytes == 64 * 32 // 2 + 2 * 32 * 4
    blocks = in_blocks(torch.randn(64, 32), "nvfp4", 16)
    found = cost(BlockLinear(blocks, "nvfp4", None), None)
    assert found.parameter_count == 64 * 32, "scales in 8 bits are no weights"
    assert found.bytes == 64 * 32 // 2 + 4 * 32 + 4
