from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enginewright.models.adapters import disenbooth
from enginewright.models.adapters.disenbooth import TINY, ImageAdapter
from enginewright.models.blocks.low_rank import LowRank, products
from enginewright.passes.contract import Context
from enginewright.passes.kernel.surgery import share
from enginewright.passes.specialize.fold_own_adapters import FoldOwnAdapters
from enginewright.validation.inputs import draw

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def strong() -> Any:
    """A small model whose adapter and mask are seen in the output."""
    torch.manual_seed(0)
    model = disenbooth.build(TINY).eval()
    with torch.no_grad():
        model.irrelevant.mask.normal_()
        for product in products(model):
            product.up.weight.mul_(5)
    return model


def example(**changed: Tensor) -> dict[str, Tensor]:
    arrays = draw(disenbooth.inputs(TINY), seed=1)
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | changed


def call(model: nn.Module, **changed: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**example(**changed))
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def base_of(model: Any) -> nn.Module:
    """The plain U-Net of diffusers with the same weights."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**disenbooth.unet_config(TINY)).eval()
    held = {name.replace(".base.", "."): tensor for name, tensor in model.unet.inner.state_dict().items()}
    unet.load_state_dict({name: tensor for name, tensor in held.items() if ".product." not in name}, strict=True)
    return unet


def test_the_published_size_has_the_counts_of_the_authors_code() -> None:
    with torch.device("meta"):
        model = disenbooth.build(disenbooth.PUBLISHED["sd2.1"])
    adapters = list(products(model))
    assert len(adapters) == 128
    assert sum(map(count, adapters)) == 829_952
    assert count(model.irrelevant) == 2_100_224
    assert count(model.unet) - 829_952 == 865_910_724


def test_an_untrained_adapter_and_no_vector_are_the_base() -> None:
    model = strong()
    with torch.no_grad():
        wanted = base_of(model)(*(example()[name] for name in ("sample", "timestep", "encoder_hidden_states")))[0]
    nothing = torch.zeros(2)
    assert distance(call(model, eta=nothing), wanted) > 1e-3
    for product in products(model):
        nn.init.zeros_(product.up.weight)
    assert torch.equal(call(model, eta=nothing), wanted)
    assert distance(call(model), wanted) > 1e-3


def test_a_merged_adapter_computes_what_it_does_unmerged_and_costs_nothing() -> None:
    model = strong()
    result = FoldOwnAdapters().apply(share(model), Context(example=example()))
    assert len(result.changed) == 4 * 2 * 4
    assert result.plan.facts["fusable"] is True
    assert not any(isinstance(module, LowRank) for module in result.model.modules())
    torch.testing.assert_close(call(result.model), call(model), **TOLERANCE)
    bare = FoldOwnAdapters(keep=()).apply(share(model), Context(example=example()))
    assert result.after.macs == bare.after.macs
    assert distance(call(bare.model), call(model)) > 1e-3


def test_the_vector_may_be_added_outside() -> None:
    model = strong()
    eta, feature = example()["eta"], example()["image_feature"]
    with torch.no_grad():
        vector = eta[:, None, None] * model.irrelevant(feature)[:, None]
    moved = example()["encoder_hidden_states"] + vector
    outside = call(model, encoder_hidden_states=moved, eta=torch.zeros(2))
    torch.testing.assert_close(outside, call(model), **TOLERANCE)
    assert distance(outside, call(model, eta=torch.zeros(2))) > 1e-3


def test_the_image_adapter_masks_before_both_ways() -> None:
    adapter = ImageAdapter(2)
    with torch.no_grad():
        for layer, weight, bias in (
            (adapter.adapter[0], [[1.0, 0.0], [0.0, -1.0]], [0.0, 0.0]),
            (adapter.adapter[2], [[2.0, 0.0], [0.0, 3.0]], [0.0, 1.0]),
        ):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    x = torch.tensor([[4.0, 2.0], [4.0, -2.0]])
    # A mask of a half: (2, 1) and (2, -1); hidden (2, 0) and (2, 1); MLP (4, 1) and (4, 4).
    torch.testing.assert_close(adapter(x), torch.tensor([[6.0, 2.0], [6.0, 3.0]]))
    with torch.no_grad():
        adapter.mask.copy_(torch.tensor([100.0, -100.0]))
    torch.testing.assert_close(adapter(x), torch.tensor([[12.0, 1.0], [12.0, 1.0]]))


@pytest.mark.parametrize("part", ["image_feature", "eta", "encoder_hidden_states", "timestep"])
def test_every_input_is_read(part: str) -> None:
    model, before = strong(), example()
    changed = before[part].flip(0) * 0.5
    assert distance(call(model, **{part: changed}), call(model)) > 1e-4
