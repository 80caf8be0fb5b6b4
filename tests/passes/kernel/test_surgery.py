import copy

import pytest
import torch
from torch import nn

from enginewright.passes.contract import Context
from enginewright.passes.kernel.surgery import head_indices, keep_columns, keep_rows
from enginewright.passes.pruning.factorize import Factorize
from enginewright.passes.pruning.sparsify_2_4 import Sparsify24
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8


@pytest.mark.parametrize("bias", [True, False])
def test_kept_rows_give_the_same_features(bias):
    linear = nn.Linear(6, 5, bias=bias)
    x = torch.randn(3, 6)

    smaller = keep_rows(linear, [0, 2, 4])

    assert (smaller.in_features, smaller.out_features) == (6, 3)
    torch.testing.assert_close(smaller(x), linear(x)[:, [0, 2, 4]])


@pytest.mark.parametrize("bias", [True, False])
def test_kept_columns_act_as_if_the_other_inputs_were_zero(bias):
    linear = nn.Linear(6, 5, bias=bias)
    x = torch.randn(3, 6)
    masked = x.clone()
    masked[:, [1, 3, 5]] = 0

    smaller = keep_columns(linear, [0, 2, 4])

    assert (smaller.in_features, smaller.out_features) == (3, 5)
    torch.testing.assert_close(smaller(x[:, [0, 2, 4]]), linear(masked))


@pytest.mark.parametrize("keep", [keep_rows, keep_columns])
def test_a_smaller_layer_is_otherwise_as_it_was(keep):
    linear = nn.Linear(4, 4, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)

    smaller = keep(linear, [1, 3])

    assert smaller.weight.dtype == smaller.bias.dtype == torch.bfloat16
    assert (smaller.weight.requires_grad, smaller.bias.requires_grad) == (False, True)
    assert not smaller.training
    assert smaller.weight.is_contiguous()


@pytest.mark.parametrize("keep", [keep_rows, keep_columns])
def test_a_smaller_layer_shares_no_memory_with_the_original(keep):
    linear = nn.Linear(4, 4)
    before = (linear.weight.clone(), linear.bias.clone())
    smaller = keep(linear, [0, 1, 2])

    with torch.no_grad():
        smaller.weight.zero_()
        smaller.bias.zero_()

    assert smaller.weight.untyped_storage().nbytes() == 12 * 4
    torch.testing.assert_close((linear.weight, linear.bias), before)


@pytest.mark.parametrize("keep", [keep_rows, keep_columns])
def test_a_layer_without_values_can_be_cut(keep):
    smaller = keep(nn.Linear(4, 4, device="meta"), [1, 3])

    assert smaller.weight.is_meta
    assert smaller.weight.numel() == 8


@pytest.mark.parametrize("keep", [keep_rows, keep_columns])
def test_cutting_draws_no_random_number(keep):
    linear = nn.Linear(4, 4)
    state = torch.get_rng_state()

    keep(linear, [1])

    assert torch.equal(torch.get_rng_state(), state)


def test_head_indices_of_a_fused_projection_repeat_in_every_stack():
    assert head_indices([0, 2], heads=3, head_dim=2) == [0, 1, 4, 5]
    assert head_indices([0, 2], heads=3, head_dim=2, stacks=2) == [0, 1, 4, 5, 6, 7, 10, 11]


class Twice(nn.Module):
    """One block under two names, and one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.again = self.block
        self.mix = nn.Linear(32, 32)
        self.ends = nn.ModuleDict({"same": self.mix})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ends["same"](self.again(self.mix(self.block(x))))


@pytest.mark.parametrize("step", [QuantizeInt8(smallest=0), Factorize(smallest=0), Sparsify24(smallest=0)])
def test_a_layer_under_several_names_is_rewritten_under_all_of_them(step):
    torch.manual_seed(0)
    call = {"x": torch.randn(4, 32)}
    context = Context(calibration=[call], example=call)
    original = Twice().eval()
    result = step.apply(copy.deepcopy(original), context)
    model = result.model
    assert model.ends["same"] is model.mix
    assert model.again is model.block
    assert "mix" in result.changed
    replayed = step.carry_out(original, result.plan, Context())
    assert replayed.ends["same"] is replayed.mix
    assert torch.equal(replayed(**call), model(**call))
