from __future__ import annotations

import pytest
import torch

from enginewright.passes.quantization.blocks import Weights, in_blocks
from enginewright.passes.quantization.gptq import gptq, inverse_factor


def correlated(rows: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 8, generator=generator) @ torch.randn(8, 64, generator=generator) + 0.1 * torch.randn(
        rows, 64, generator=generator
    )


@pytest.mark.parametrize("weights", ["int4", "nvfp4"])
def test_its_output_is_nearer_than_rounding_to_nearest_on_correlated_inputs(weights: Weights) -> None:
    x, weight = correlated(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    exact = x @ weight
    found = {
        "gptq": gptq(weight, x.T @ x, weights, 16).values(),
        "rtn": in_blocks(weight, weights, 16).values(),
    }
    error = {name: float((x @ values - exact).norm() / exact.norm()) for name, values in found.items()}
    assert error["gptq"] < 0.7 * error["rtn"]


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    x = torch.eye(32)
    weight = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gptq(weight, x.T @ x, "int4", 16).codes, in_blocks(weight, "int4", 16).codes)


def test_two_inputs_by_hand() -> None:
    # One block of 16 whose first two inputs are the same; the rest never occur. Scale 1 (largest weight 7).
    weight = torch.zeros(16, 1)
    weight[0], weight[1], weight[15] = 2.4, 1.3, 7.0
    x = torch.zeros(100, 16)
    x[:, :2] = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    codes = gptq(weight, x.T @ x, "int4", 16).codes.flatten().tolist()
    assert codes[:2] == [2, 2], "2.4 rounds to 2, and the 0.4 goes to the other: 1.3 + 0.4 rounds to 2"
    assert in_blocks(weight, "int4", 16).codes.flatten().tolist()[:2] == [2, 1]


def test_inputs_that_never_occur_do_not_stop_it() -> None:
    x = correlated()
    x[:, 5] = 0
    assert inverse_factor(x.T @ x).isfinite().all()
    assert inverse_factor(torch.zeros(16, 16)).isfinite().all()
