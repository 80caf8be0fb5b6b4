"""The interpreters that ship, and the recipe that uses them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from enginewright import catalog, recipe, sources
from enginewright.models.blocks.digits import held_out
from enginewright.passes.contract import Context, Result
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.dropping import keep_maps
from enginewright.passes.tokens.policy import hide_tokens
from enginewright.passes.tokens.prune_tokens import PruneTokens
from enginewright.training.vit_digits import Told
from tests.passes.tokens.engines import agrees, exported


@cache
def applied() -> tuple[nn.Module, Result]:
    """The shipped network, and what the recipe's step makes of it."""
    found = recipe.read(catalog.entry("recipes", "ia-red2").path)
    net = sources.load(found.model).module
    context = Context(example=call(1), folder=found.folder, original=net)
    return net, found.steps[0].apply(share(net), context)


def call(count: int) -> dict[str, Tensor]:
    return {"image": torch.from_numpy(held_out()[0][:count])}


def right(model: nn.Module) -> float:
    """The share of all held-out digits whose class is told."""
    pictures, classes = (torch.from_numpy(each) for each in held_out())
    parts = [Told(model, *part)() for part in zip(pictures.split(250), classes.split(250), strict=True)]
    return float(torch.cat(parts).double().mean())


def test_at_most_0_7_points_are_lost_for_1_4_times_fewer_products():
    net, result = applied()
    assert result.before.macs >= 1.4 * result.after.macs  # type: ignore[operator]
    before = right(net)
    assert before >= 0.97
    assert before - right(result.model) <= 0.007


def test_kept_tokens_are_nested_and_as_many_of_each_picture():
    _, result = applied()
    maps = keep_maps(result.model, call(50))  # (B, borders, N)
    counts = [kept.count + 1 for kept in result.plan.choice.values()]
    assert maps.sum(dim=2).tolist() == [counts] * 50
    assert not (maps[:, 1:] & ~maps[:, :-1]).any(), "a token came back"
    assert len({tuple(each.tolist()) for each in maps[:, 0]}) > 10, "pictures are looked at"


def test_interpreters_are_far_from_what_they_started_from_and_small():
    net, result = applied()
    start = PruneTokens(method="policy", borders=(2, 4)).plan(net, Context(calibration=[call(200)], original=net))
    assert result.plan.arrays.keys() == start.arrays.keys()
    for name, array in result.plan.arrays.items():
        assert (array - start.arrays[name]).norm() > 0.1 * start.arrays[name].norm()
    total = sum(parameter.numel() for parameter in net.parameters())
    assert sum(array.numel() for array in result.plan.arrays.values()) < 0.01 * total


def test_the_policy_keeps_more_tokens_of_an_eight_than_of_a_one():
    net, result = applied()
    model = share(net)
    first, *_ = hide_tokens(model, result.plan)
    pictures, classes = (torch.from_numpy(each) for each in held_out())
    with torch.no_grad():
        model(pictures)
    kept = first.kept.sum(dim=1).double()
    assert kept[classes == 8].mean() > kept[classes == 1].mean() + 3


def test_the_exported_graph_is_the_same_at_every_batch(tmp_path: Path):
    _, result = applied()
    path = exported(result.model, call(2), tmp_path)
    agrees(result.model, [call(1), call(2), call(7)], path)
