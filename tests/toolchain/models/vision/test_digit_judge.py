from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file

from enginewright import sources
from enginewright.models.blocks.digits import WEIGHTS, read


def test_the_judge_reads_real_digits_that_it_was_not_trained_on() -> None:
    pictures = load_file(WEIGHTS / "digits-reference.safetensors")["pictures"].float() / 127.5 - 1
    classes, _ = read(pictures.numpy())
    assert (classes == np.arange(20) % 10).mean() >= 0.95


def test_it_is_a_model_like_any_other() -> None:
    model = sources.load("digit_judge")
    assert model.name == "digit_judge:digits"
    assert model.weights == "trained, shipped"
    with torch.no_grad():
        assert model.module(x=torch.zeros(2, 1, 28, 28)).shape == (2, 10)
