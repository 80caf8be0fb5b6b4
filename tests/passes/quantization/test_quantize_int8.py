from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.kernel.scales import Mix, arithmetic, as_bytes, least_squares_limit, saturation
from enginewright.passes.quantization.linear import QuantizedLinear
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 64)
        self.one = nn.Linear(64, 64)
        self.two = nn.Linear(64, 64)
        self.small = nn.Linear(64, 2)
        self.idle = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(self.two(torch.relu(self.one(self.embed(x)))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


CALLS = Context(calibration=[{"x": torch.arange(8)}], example={"x": torch.arange(8)})


def test_planned_layers_change_and_every_other_has_a_reason(net: Net) -> None:
    result = QuantizeInt8(exclude=("tw*",)).apply(net, CALLS)
    assert result.changed == ("one",)
    assert isinstance(result.model.one, QuantizedLinear)
    reasons = result.plan.skipped
    assert "only linear" in reasons["embed"]
    assert "'tw*'" in reasons["two"]
    assert "128 weights" in reasons["small"]
    assert "never called" in reasons["idle"]
    assert result.after.bytes < result.before.bytes
    assert result.after.parameter_count == result.before.parameter_count
    assert result.after.macs == result.before.macs


def test_a_rewrite_from_the_written_plan_is_the_same_to_the_bit(net: Net) -> None:
    again = copy.deepcopy(net)
    done = QuantizeInt8()
    result = done.apply(net, CALLS)
    read = Plan.from_json(result.plan.as_json(), by=done.declared)
    assert read.digest() == result.plan.digest()
    x = torch.arange(8)
    assert torch.equal(done.rewrite(again, read)(x), result.model(x))


def test_the_output_stays_close_and_does_move(net: Net) -> None:
    x = torch.arange(8)
    before = net(x).detach()
    after = QuantizeInt8().apply(net, CALLS).model(x).detach()
    error = float((after - before).norm() / before.norm())
    assert 0 < error < 0.03


def test_without_calibration_it_says_so(net: Net) -> None:
    with pytest.raises(ToolchainError, match="needs calibration"):
        QuantizeInt8().apply(net, Context())


def test_inputs_that_are_not_finite_or_all_zero_are_skipped_with_that_reason(net: Net) -> None:
    with torch.no_grad():
        net.embed.weight.fill_(float("nan"))
    assert "not finite" in QuantizeInt8().plan(net, CALLS).skipped["one"]
    with torch.no_grad():
        net.embed.weight.zero_()
    assert "is zero" in QuantizeInt8().plan(net, CALLS).skipped["one"]


def test_an_outlier_moves_the_maximum_but_not_the_percentile_or_least_squares(net: Net) -> None:
    with torch.no_grad():
        net.embed.weight.uniform_(-1, 1)
        net.embed.weight[0, 0] = 50
    scale = {
        name: QuantizeInt8(observer=name, percentile=99).plan(net, CALLS).choice["one"].input_scale
        for name in ("max", "percentile", "mse")
    }
    assert scale["max"] == pytest.approx(50 / 127, rel=1e-4)
    assert scale["percentile"] < 1.01 / 127
    assert scale["mse"] <= scale["max"]


def test_least_squares_clips_a_rare_outlier() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[0] = 20
    assert least_squares_limit(x, 20) < 15


@pytest.mark.parametrize("bad", [{"observer": "median"}, {"percentile": 101}, {"smallest": -1}, {"bits": 4}])
def test_parameters_out_of_range_are_quoted(bad: dict[str, object]) -> None:
    key, value = next(iter(bad.items()))
    with pytest.raises(ToolchainError) as caught:
        QuantizeInt8(**bad)
    assert key in str(caught.value)
    assert key == "bits" or repr(value) in str(caught.value)


def test_an_exclusion_that_matches_nothing_is_an_error(net: Net) -> None:
    with pytest.raises(ToolchainError, match=r"exclude 'thre\*' matches no linear layer"):
        QuantizeInt8(exclude=("thre*",)).plan(net, CALLS)


def naive(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, int]:
    """vpmaddubsw and vpmaddwd, one pair at a time: x (R, K) uint8, w (N, K) int8."""
    out, clipped = np.zeros((len(x), len(w))), 0
    for i in range(len(x)):
        for j in range(len(w)):
            for k in range(0, x.shape[1], 2):
                pair = int(x[i, k]) * int(w[j, k]) + int(x[i, k + 1]) * int(w[j, k + 1])
                held = max(-32768, min(32767, pair))
                clipped += held != pair
                out[i, j] += held
    return out, clipped


def test_saturation_is_what_the_instructions_do() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-0.2, 1, (5, 70)).astype(np.float32))
    weight = torch.from_numpy(rng.standard_normal((3, 70)).astype(np.float32))
    weight[0] = weight[0].abs()  # all of one sign: pairs add up
    full, reduced, share = saturation(x, weight)
    low, high = float(x.min()), float(x.max())
    step = (high - low) / 255
    zero = round(-low / step)
    q = np.clip(np.round(x.numpy() / step) + zero, 0, 255).astype(np.uint8)
    scale = np.abs(weight.numpy()).max(1) / 127
    w = np.round(weight.numpy() / scale[:, None]).astype(np.int8)
    product, clipped = naive(q, w)
    product = (product - zero * w.astype(np.float64).sum(1)) * step * scale
    exact = (x @ weight.T).numpy()
    assert share == pytest.approx(clipped / (5 * 3 * 35))
    assert share > 0
    assert full == pytest.approx(np.linalg.norm(product - exact) / np.linalg.norm(exact), rel=1e-3)
    assert reduced < full


def test_seven_bits_never_pay_where_nothing_saturates() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(16, 64, generator=generator)
    low[:, 0] = 100  # every other weight is small beside it
    x = torch.rand(8, 64, generator=generator)
    full, reduced, share = saturation(x, low)
    assert share == 0
    assert full <= reduced


def test_uneven_rows_are_marked_for_scales_of_their_own_and_even_ones_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 32, generator=generator), torch.randn(16, 32, generator=generator)
    sizes = torch.logspace(-2, 0, 64)[:, None]
    assert arithmetic(x * sizes, weight)["rows"] is True
    assert arithmetic(x * sizes, weight, products=False)["rows"] is False
    assert arithmetic(x.clamp(-2, 2), weight)["rows"] is False


def test_bytes_with_one_scale_are_those_of_the_operator_and_rows_use_their_whole_range() -> None:
    x = torch.tensor([[-1.0, 0.5, 3.0], [0.01, 0.018, 0.03]])
    q, step, zero = as_bytes(x, by_row=False)
    assert q.tolist() == [[0, 96, 255], [65, 65, 66]]
    assert float(step) == pytest.approx(4 / 255)
    assert float(zero) == 64
    q, step, zero = as_bytes(x, by_row=True)
    assert q.tolist() == [[0, 96, 255], [0, 102, 255]]
    torch.testing.assert_close((q - zero) * step, x, atol=0.01, rtol=0)


def test_the_plan_tells_the_mix_of_timesteps_that_it_was_calibrated_on(dit):
    calls = [{**dit.inputs, "t": torch.tensor([10, 20])}, {**dit.inputs, "t": torch.tensor([30, 900])}]
    plan = QuantizeInt8(smallest=0).plan(dit.model, Context(calibration=calls, example=calls[0]))

    assert plan.facts.calibration_calls == 2
    assert plan.facts.calibration_mix["t"] == Mix(samples=4, quantiles=[10.0, 17.5, 25.0, 247.5, 900.0])
    assert "x" not in plan.facts.calibration_mix
