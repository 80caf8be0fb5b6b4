from __future__ import annotations

import pytest
import torch

from enginewright import sources
from enginewright.models.blocks.ddpm import Process
from enginewright.models.diffusion import dydit
from enginewright.training import dydit_digits


def test_the_target_falls_from_one() -> None:
    assert [dydit_digits.target_at(done, 0.5) for done in (0, 0.03, 0.3, 1)] == pytest.approx([1, 1, 0.5, 0.5])
    assert dydit_digits.target_at(0.165, 0.5) == pytest.approx(0.75)


def test_timesteps_are_as_many_of_each_quarter() -> None:
    t = dydit_digits.stratified(Process(), 400)
    assert (t // 250).bincount().tolist() == [100, 100, 100, 100]


def test_training_starts_as_the_dit_that_ships() -> None:
    net, plain = dydit_digits.started().eval(), sources.load("dit:digits").module
    inputs = {"x": torch.randn(2, 1, 28, 28), "t": torch.tensor([700.0, 10.0]), "y": torch.tensor([3, 10])}
    with torch.no_grad():
        assert torch.equal(net(**inputs), plain(**inputs))
    rates = [group["lr"] for group in dydit_digits.groups(net, 3e-4)]
    assert sorted(rates) == [3e-4, 1e-3, 3e-3, 5e-2, 0.1]  # type: ignore[type-var]


def test_what_ships_keeps_to_its_target_in_half_of_the_memory() -> None:
    net = sources.load("dydit:digits").module
    assert isinstance(net, dydit.DyDiT)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert dydit_digits.FILE.stat().st_size < 0.52 * sum(4 * parameter.numel() for parameter in net.parameters())
    _, shares = next(dydit_digits.runs(net, 10))
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    assert shares.std() > 0.01  # some timesteps need less
    masks = net.width_masks(torch.tensor(Process().timesteps(25)))
    assert all(mask[:, 0].all() for mask in masks.values())
