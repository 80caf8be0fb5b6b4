"""Scores by name, for passes that search."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.recipe import make
from enginewright.scoring import losses_of, score_of


def recipe(tmp_path: Path, model: str = "dit:tiny"):
    content = {"model": model, "calibration": {"calls": 2}, "validation": {"samples": 8}}
    return make(content, folder=tmp_path)


def test_fidelity_is_nothing_lost_for_the_original_and_less_for_any_other(tmp_path: Path) -> None:
    model = sources.load("dit:tiny")
    score = score_of("fidelity", model, recipe(tmp_path))
    other = copy.deepcopy(model.module)
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    assert score(model.module) == 0
    assert score(other) < 0


def test_a_metric_of_sampling_runs_is_a_score_turned_so_that_higher_is_better(tmp_path: Path) -> None:
    model = sources.load("dit:digits")
    asked = recipe(tmp_path, "dit:digits")
    assert score_of("judged_as_asked", model, asked)(model.module) > 0.9
    blank = copy.deepcopy(model.module)
    with torch.no_grad():
        blank.final_layer.linear.weight.zero_()
    nearer = score_of("psnr_db", model, asked)
    assert nearer(blank) < 30


def test_a_users_function_is_called_with_the_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def size(module):\n    return -sum(p.numel() for p in module.parameters())\n"
        "def wrong(module):\n    return float('nan')\n"
        "def broken(module):\n    raise KeyError('x')\n"
    )
    model = sources.load("dit:tiny")
    assert score_of("mine.py:size", model, recipe(tmp_path))(model.module) < -1000
    with pytest.raises(ToolchainError, match="wrong gave a score that is no number"):
        score_of("mine.py:wrong", model, recipe(tmp_path))(model.module)
    with pytest.raises(ToolchainError, match=r"broken\(module\) failed: KeyError"):
        score_of("mine.py:broken", model, recipe(tmp_path))(model.module)
    with pytest.raises(ToolchainError, match="no function named 'siz'"):
        score_of("mine.py:siz", model, recipe(tmp_path))


def test_unknown_scores_and_scores_that_a_model_cannot_have(tmp_path: Path) -> None:
    model = sources.load("dit:tiny")
    with pytest.raises(ToolchainError, match="no score named 'fidelty'"):
        score_of("fidelty", model, recipe(tmp_path))
    with pytest.raises(ToolchainError, match="dit:tiny has no sampling task"):
        score_of("judged_as_asked", model, recipe(tmp_path))
    with pytest.raises(ToolchainError, match="is of whole sound runs, and dit:tiny has no sound task"):
        score_of("sound_snr_db", model, recipe(tmp_path))


def test_losses_are_a_users_function_with_a_number_for_each_sample(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef each(module):\n    return [0.5, 1.0]\n"
        "def one(module):\n    return torch.tensor(0.5)\n"
        "def wrong(module):\n    return [0.5, float('nan')]\n"
    )
    module = torch.nn.Linear(1, 1)
    assert losses_of("mine.py:each", tmp_path)(module).tolist() == [0.5, 1.0]
    with pytest.raises(ToolchainError, match=r"one loss for each sample, in one dimension, is wanted; got shape \(\)"):
        losses_of("mine.py:one", tmp_path)(module)
    with pytest.raises(ToolchainError, match="wrong gave a score that is no number"):
        losses_of("mine.py:wrong", tmp_path)(module)
    with pytest.raises(ToolchainError, match=r"a function of yours, FILE.py:FUNCTION; 'fidelity' names none"):
        losses_of("fidelity", tmp_path)
