from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.models.adapters.splitflux import GatedLowRank
from enginewright.models.blocks.low_rank import LowRank, Product, products
from enginewright.passes.contract import Context
from enginewright.passes.specialize.fold_own_adapters import FoldOwnAdapters

CALL = {"x": torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))}


class Net(nn.Module):
    """A style of rank 2 and, behind it, a content of ranks 2 and 1 that a gate mixes; one token of text."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.style = LowRank(first, Product(first, 2), 3.0, part="style")
        self.content = GatedLowRank(second, 2, 1, text=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.content(self.style(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    for product in products(net):
        nn.init.normal_(product.up.weight)
    return net


def answer(net: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(**CALL)
    return found


def by_hand(net: Net, style: float, content: float, residual: float) -> Tensor:
    """What the network gives with its products times these numbers."""
    with torch.no_grad():
        x = net.style.base(CALL["x"]) + style * net.style.product(CALL["x"], 3.0)
        return net.content.base(x) + content * net.content.content(x, 1.0) + residual * net.content.residual(x, 1.0)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"branch": "content"}, (1, 1, 0)),
        ({"branch": "residual"}, (1, 0, 1)),
        ({"keep": ("style",)}, (1, 0, 0)),
        ({"keep": ("content",), "branch": "content"}, (0, 1, 0)),
        ({"keep": ()}, (0, 0, 0)),
    ],
)
def test_what_is_wanted_goes_into_the_weights_and_what_is_not_goes(settings: Any, kept: Any, net: Net) -> None:
    step = FoldOwnAdapters(**settings)
    result = step.apply(copy.deepcopy(net), Context(example=CALL))
    wanted = by_hand(net, *kept)
    torch.testing.assert_close(answer(result.model), wanted, atol=1e-5, rtol=1e-5)
    assert (answer(net) - wanted).abs().max() > 0.05
    assert [type(layer) for layer in result.model.children()] == [nn.Linear, nn.Linear]
    intended = step.intended(net, result.plan, Context())
    torch.testing.assert_close(answer(intended), wanted, atol=1e-5, rtol=1e-5)
    assert any(isinstance(module, Product) for module in intended.modules()) == (1 in kept)
    assert result.plan.facts.fusable is True
    assert result.after.macs == 2 * 5 * (6 * 6 + 6 * 4)
    assert type(net.style) is LowRank, "the original stays"


def test_a_gate_goes_into_no_weight_and_its_cost_is_told(net: Net) -> None:
    step, before = FoldOwnAdapters(), answer(net)
    result = step.apply(copy.deepcopy(net), Context(example=CALL))
    torch.testing.assert_close(answer(result.model), before, atol=1e-5, rtol=1e-5)
    assert result.changed == ("style",)
    why = "not fusable: a gate mixes its two branches anew for each token"
    assert result.plan.skipped == {"content": why}
    assert step.intended(net, result.plan, Context()) is net
    added, percent = 2 * 5 * 3 * (6 + 4), 100 * 3 * (6 + 4) / (6 * 6 + 6 * 4)
    assert result.plan.facts.as_json() == {
        "fusable": False,
        "notes": [
            "fusable: the adapters of 1 layers went into weights, at the base's cost",
            f"the adapters of 1 layers stay beside them, {why}; they add {added} multiply-accumulates to a call "
            f"({percent:.3g} %)",
        ],
    }


def test_what_a_model_calls_otherwise_is_refused_with_the_nearest(net: Net) -> None:
    with pytest.raises(ToolchainError, match="there is no adapter named 'stile'") as caught:
        FoldOwnAdapters(keep=("stile",)).plan(net, Context())
    assert caught.value.help == "did you mean 'style'?"
    with pytest.raises(ToolchainError, match="there is no branch named 'style'"):
        FoldOwnAdapters(branch="style").plan(net, Context())


def test_a_layer_that_lost_its_adapter_is_named(net: Net) -> None:
    step = FoldOwnAdapters()
    plan = step.plan(net, Context())
    net.style = net.style.base  # type: ignore[assignment]
    with pytest.raises(ToolchainError, match="a Linear is here, which holds no adapter of its own") as caught:
        step.rewrite(net, plan)
    assert caught.value.where == "style"


def test_a_model_without_any_is_left_alone() -> None:
    result = FoldOwnAdapters(keep=("style",), branch="content").apply(nn.Sequential(nn.Linear(2, 2)), Context())
    assert not result.changed
    assert "no layers that hold adapters of their own" in result.plan.skipped[""]
