"""What searches of heads raise: numbers of pictures, by hand; and which heads a module has perturbed."""

import numpy as np
import pytest
import torch
from torch import nn

from enginewright.models.diffusion.dit import TINY, DiT
from enginewright.passes.contract import Context
from enginewright.passes.heads.perturb_heads import PerturbHeads
from enginewright.reports.benchmarks.head_guidance import drawn, ink, perturbed_heads, slant


def test_ink_is_the_share_of_a_picture_that_is_no_paper():
    pictures = np.full((2, 1, 28, 28), -1.0)
    pictures[0, 0, :7] = 1.5  # a quarter, and beyond the range counts as full
    assert ink(pictures) == pytest.approx(0.125)


@pytest.mark.parametrize(("step", "wanted"), [(0, 0.0), (1, 1.0), (-1, -1.0)])
def test_a_stroke_leans_by_the_columns_that_it_goes_right_for_each_row_upwards(step, wanted):
    pictures = np.full((1, 1, 28, 28), -1.0)
    for row in range(5, 23):
        pictures[0, 0, row, 14 - step * (row - 14)] = 1
    assert slant(pictures) == pytest.approx(wanted)


def test_perturbed_heads_are_told_from_others():
    model = DiT(TINY).eval()
    first = PerturbHeads(heads={"blocks.0.attn": (1, 3)}, u=0.5).apply(model, Context()).model
    assert perturbed_heads(first) == "blocks.0.attn.proj [1, 3]"
    assert perturbed_heads(DiT(TINY)) == ""


def test_digits_drawn_without_guidance_ask_for_their_class_alone():
    class Answers(nn.Module):
        """Gives the class back as the velocity, and notes how many rows it was asked for."""

        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x, t, y):
            self.seen.append((len(x), y.tolist()))
            return torch.cat([x * 0 + y[:, None, None, None] / 10, x * 0], dim=1)

    net = Answers()
    pictures = drawn(net, 3, seed=0)
    assert pictures.shape == (3, 1, 28, 28)
    assert all(seen == (3, [0, 1, 2]) for seen in net.seen)
