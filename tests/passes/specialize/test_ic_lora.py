"""In-Context LoRA: an adapter of all linear layers of Flux's blocks, added to their weights before anything else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from enginewright import catalog, sources
from enginewright.passes.contract import Context
from enginewright.passes.kernel.surgery import share
from enginewright.passes.specialize.fold_adapters import FoldAdapters
from enginewright.reports.benchmarks import scores

pytest.importorskip("diffusers")
pytest.importorskip("peft")
FOLDER = catalog.recipe_path("ic-lora-tiny").parent
FILE = "ic-lora-tiny.safetensors"


@pytest.fixture(scope="module")
def loaded() -> Any:
    """The network of the recipe that ships."""
    return sources.load(f"py:{FOLDER}/tiny_networks.py:flux_of_any_size")


def velocity(model: nn.Module, loaded: Any) -> Tensor:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in loaded.example.items()}).sample


def folded(loaded: Any, folder: Path = FOLDER, **settings: Any) -> Any:
    """What the pass makes of the network."""
    step = FoldAdapters(file=FILE, **{"alpha": 2, **settings})
    return step.apply(share(loaded.module), Context(folder=folder))


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def test_the_file_that_ships_adapts_every_linear_layer_of_the_blocks(loaded: Any, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import tiny_networks  # type: ignore[import-not-found]

    tensors, wanted = load_file(FOLDER / FILE), tiny_networks.adapter()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    changed = folded(loaded).changed
    linears = {path for path, layer in loaded.module.named_modules() if isinstance(layer, nn.Linear)}
    assert set(changed) == {path for path in linears if "transformer_blocks." in path}
    assert len(changed) == 2 * 14 + 2 * 6


def test_a_second_factor_of_zero_or_a_strength_of_zero_leaves_every_bit(loaded: Any, tmp_path: Path) -> None:
    tensors = {name: each * ("lora_A" in name) for name, each in load_file(FOLDER / FILE).items()}
    save_file(tensors, tmp_path / FILE)
    before = velocity(loaded.module, loaded)
    assert torch.equal(velocity(folded(loaded, tmp_path).model, loaded), before)
    assert torch.equal(velocity(folded(loaded, scale=0.0).model, loaded), before)
    assert apart(velocity(folded(loaded).model, loaded), before) > 0.05


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_folded_it_computes_what_it_computes_beside_the_weights(loaded: Any, strength: float) -> None:
    step = FoldAdapters(file=FILE, alpha=2, scale=strength)
    plan = step.plan(loaded.module, Context(folder=FOLDER))
    beside = velocity(step.intended(loaded.module, plan, Context()), loaded)
    torch.testing.assert_close(velocity(folded(loaded, scale=strength).model, loaded), beside, rtol=1e-4, atol=1e-5)
    assert apart(beside, velocity(folded(loaded, scale=1.5 - strength).model, loaded)) > 0.01


def test_folding_back_gives_the_weights_to_rounding_and_not_their_bits(loaded: Any) -> None:
    there = folded(loaded).model
    back = FoldAdapters(file=FILE, alpha=2, scale=-1.0).apply(share(there), Context(folder=FOLDER)).model
    pairs = [(back.get_parameter(name), weight) for name, weight in loaded.module.named_parameters()]
    assert all(
        apart(found, weight) <= 2e-7 * there.get_parameter(name).abs().max()
        for (found, weight), name in zip(pairs, dict(loaded.module.named_parameters()), strict=True)
    )
    assert any(not torch.equal(found, weight) for found, weight in pairs)


@pytest.mark.parametrize("strength", [0.02, 0.2])
def test_eight_bits_cost_about_the_same_with_an_adapter_in_the_weights(strength: float) -> None:
    """Their error is of the weights' size: the larger what the adapter adds is, the less of it is lost."""
    assert scores.lost_of_adapter(f"512, {strength}") == pytest.approx(0.00535 / strength, rel=0.05)
    assert scores.adapters_share_of_error(f"512, {strength}") == pytest.approx(strength**2, abs=0.01)
