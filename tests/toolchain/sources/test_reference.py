from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from enginewright import sources
from enginewright.ground.errors import ToolchainError


def test_unknown_names_and_sizes_offer_the_nearest() -> None:
    with pytest.raises(ToolchainError, match="did you mean 'dit'"):
        sources.load("dti:digits")
    with pytest.raises(ToolchainError, match="did you mean 'digits'"):
        sources.load("dit:digit")


def test_the_size_that_ships_weights_is_the_default() -> None:
    assert sources.load("digit_judge").name == "digit_judge:digits"


def test_random_weights_say_so_and_leave_no_gate_shut() -> None:
    model = sources.load("dit:tiny", seed=3)
    assert model.weights == "random, seed 3"
    assert all(parameter.any() for parameter in model.module.parameters())


def test_weights_from_a_file_must_fit(tmp_path: Path) -> None:
    state = sources.load("dit:tiny", seed=7).module.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    model = sources.load("dit:tiny", weights=tmp_path / "w.safetensors")
    assert model.weights == "from w.safetensors"
    assert all(torch.equal(state[k], v) for k, v in model.module.state_dict().items())

    wrong = {**state, "pos_embed": state["pos_embed"][:, :3].clone(), "stranger": torch.zeros(1)}
    del wrong["x_embedder.proj.bias"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ToolchainError) as caught:
        sources.load("dit:tiny", weights=tmp_path / "wrong.safetensors")
    text = str(caught.value)
    assert "missing x_embedder.proj.bias" in text
    assert "unknown stranger" in text
    assert "pos_embed is (1, 3, 32), the model has (1, 16, 32)" in text


def test_a_file_cut_short_is_said_to_be(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ToolchainError, match="cut short"):
        sources.load("dit:tiny", weights=tmp_path / "cut.safetensors")
