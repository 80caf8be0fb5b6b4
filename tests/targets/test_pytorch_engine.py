from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.targets.pytorch_engine import EagerRunner, PyTorch, flat


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(x)
        return {"hidden": hidden, "out": self.second(hidden)}


def test_it_runs_by_name_without_gradients() -> None:
    net = Two()
    found = EagerRunner(net, threads=1, outputs=["a", "b"])({"x": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(found["b"], net(torch.ones(2, 4))["out"].detach())


def test_a_contract_that_names_too_few_outputs_is_an_error() -> None:
    with pytest.raises(ToolchainError, match="returned 2 tensors; its contract names 1"):
        EagerRunner(Two(), threads=1, outputs=["a"])({"x": np.ones((2, 4), np.float32)})


def test_the_layer_where_values_stop_being_finite_is_named() -> None:
    net = Two()
    x = {"x": np.ones((2, 4), np.float32)}
    assert EagerRunner(net, threads=1).first_non_finite(x) == ""
    with torch.no_grad():
        net.first.weight[0, 0] = float("nan")
    assert EagerRunner(net, threads=1).first_non_finite(x) == "first"


def test_flat_goes_through_nested_results() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert [t.item() for t in flat({"x": (a, None), "y": [b]})] == [0, 1]


def test_the_target_runs_everywhere() -> None:
    assert PyTorch().availability().runnable.yes


def test_sizes_that_the_model_does_not_take_are_named_without_a_traceback() -> None:
    runner = EagerRunner(Two(), threads=1, dims={"x": ("batch", "width")})
    with pytest.raises(ToolchainError, match=r"does not take batch = 2, width = 5 \(x \(2, 5\)\): mat1 and mat2"):
        runner({"x": np.ones((2, 5), np.float32)})


class Noisy(torch.nn.Module):
    """Drops values also when it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x)))


def test_the_layer_that_draws_random_numbers_is_named() -> None:
    module = Noisy().eval()
    call = {"x": np.ones((8, 4), np.float32)}
    assert EagerRunner(module, threads=1).first_unsteady(call) == ""
    module.second.train()
    assert EagerRunner(module, threads=1).first_unsteady(call) == "second"
