"""What targets are told about layers stays true whatever later steps do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from enginewright import pipeline
from enginewright.passes.kernel.patterns import is_two_in_four, keeps_pattern
from enginewright.passes.networks import networks_of
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.targets import machine
from enginewright.targets.contract import LayerHint

INT8 = {"pass": "quantize_int8", "smallest": 0}


def run_of(*steps: dict[str, Any], folder: Path = Path()) -> pipeline.Run:
    recipe = make(
        {"model": "dit:tiny", "steps": list(steps), "calibration": {"calls": 16}, "validation": {"threads": 1}},
        folder=folder,
    )
    return pipeline.Run(recipe, Progress(quiet=True))


def layers_named(network: nn.Module, hints: dict[str, Any], key: str) -> set[str]:
    found = {path for path, hint in hints.items() if getattr(hint, key)}
    assert found <= {path for path, _ in network.named_modules()}, "a hint names a layer that is not there"
    return found


def test_eight_bit_layers_of_each_network_by_timestep_are_found_under_its_own_paths() -> None:
    run = run_of({"pass": "slice_width_by_timestep", "buckets": 2, "steps": 4}, INT8)
    module = run.optimize()
    parts = networks_of(module)
    assert len(parts) == 2
    for network in parts.values():
        quantized = {path for path, layer in network.named_modules() if type(layer).__name__ == "QuantizedLinear"}
        assert len(quantized) > 8
        assert layers_named(network, run.hints.of(network, module), "precision") == quantized


def test_the_guard_against_saturation_holds_after_slicing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "int8_saturates", lambda: True)
    said = {}
    for name, steps in {
        "whole": [INT8],
        "sliced": [{"pass": "slice_width_by_timestep", "buckets": 2, "steps": 4}, INT8],
    }.items():
        recipe = make(
            {
                "model": "dit:tiny",
                "steps": steps,
                "targets": [{"target": "onnxruntime", "int8": "static"}],
                "calibration": {"calls": 2},
                "validation": {"skip": True, "threads": 1},
            }
        )
        report, _ = pipeline.export(recipe, tmp_path / name, force=False, progress=Progress(quiet=True))
        [said[name]] = [note for note in report.targets[0].notes if "7-bit" in note][:1]
    assert not said["whole"].startswith("0 of")
    assert not said["sliced"].startswith("0 of"), said


def test_a_layer_that_a_later_step_moves_keeps_what_was_said_of_it() -> None:
    run = run_of({"pass": "quantize_int8"}, {"pass": "merge_tokens", "r": 2})
    module = run.optimize()
    quantized = {path for path, layer in module.named_modules() if type(layer).__name__ == "QuantizedLinear"}
    assert layers_named(module, run.hints.of(module, module), "precision") == quantized


def sparse_layers(module: nn.Module) -> set[str]:
    return {path for path, layer in module.named_modules() if keeps_pattern(layer)}


@pytest.mark.parametrize("rank", [0, 2])
def test_recovery_keeps_two_of_four_weights_zero(rank: int) -> None:
    train = {"pass": "distill", "steps": 3, "batch": 2, "lr": 0.01, "rank": rank}
    made = run_of({"pass": "sparsify_2_4", "smallest": 0})
    wanted = sparse_layers(made.optimize())
    run = run_of({"pass": "sparsify_2_4", "smallest": 0}, train)
    module = run.optimize()
    assert len(wanted) > 8
    assert sparse_layers(module) >= wanted
    assert set(run.results[1][1].changed) & wanted, "training moved the weights that are left"
    assert layers_named(module, run.hints.of(module, module), "pattern") == wanted
    assert run.hints.notes == {}


def test_a_step_that_takes_the_zeros_away_says_so_and_no_target_hears_of_them(tmp_path: Path) -> None:
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    adapter = {f"blocks.0.attn.proj.{half}.weight": tensor for half, tensor in factors.items()}
    save_file(adapter, tmp_path / "adapter.safetensors")
    fold = {"pass": "fold_adapters", "file": "adapter.safetensors", "alpha": 2.0}
    run = run_of({"pass": "sparsify_2_4", "smallest": 0}, fold, folder=tmp_path)
    module = run.optimize()
    told = layers_named(module, run.hints.of(module, module), "pattern")
    assert "blocks.0.attn.proj" not in told
    assert told == sparse_layers(module)
    [note] = run.hints.notes[1]
    assert "the 2:4 zeros of 1 layers are gone after this step" in note
    assert "blocks.0.attn.proj" in note


def test_what_was_said_of_a_layer_stays_with_it_when_another_comes_around_it(tmp_path: Path) -> None:
    adapters = {"pass": "adapters_as_inputs", "layers": ["*.qkv"], "rank": 2}
    run = run_of({"pass": "quantize_int8", "smallest": 0}, adapters, folder=tmp_path)
    module = run.optimize()
    told = run.hints.of(module, module)
    assert told["blocks.0.attn.qkv.base"].precision == "int8"
    assert "blocks.0.attn.qkv" not in told


def test_the_pattern_is_told_by_hand_made_weights() -> None:
    assert is_two_in_four(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]))
    assert not is_two_in_four(torch.tensor([[1.0, 1, 2, 0, 0, 0, 0, 3]]))
    assert not is_two_in_four(torch.zeros(2, 8))
    assert not is_two_in_four(torch.ones(2, 6))


def test_a_hint_is_what_targets_know_of_a_decision_and_no_more() -> None:
    decision = {"precision": "int8", "input_scale": 0.1, "rows": True, "saturating_share": 0.2, "reduced_range": False}
    assert LayerHint.of(decision) == LayerHint(precision="int8", rows=True)
