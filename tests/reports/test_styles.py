"""The styles that fine-tunes are trained on do to a straight stroke what they are called."""

import pytest
import torch

from enginewright.reports.benchmarks.head_guidance import ink, slant
from enginewright.reports.benchmarks.styles import STYLES


def stroke():
    """An upright stroke, two columns wide, in the middle."""
    picture = torch.full((1, 1, 28, 28), -1.0)
    picture[..., 6:22, 13:15] = 1
    return picture


@pytest.mark.parametrize(
    ("name", "pixels", "lean"), [("bold", 18 * 4, 0.0), ("slanted", 16 * 2, 0.5), ("small", 16 * 2 / 1.6**2, 0.0)]
)
def test_a_stroke_is_bold_slanted_or_small(name, pixels, lean):
    drawn = STYLES[name](stroke()).numpy()
    assert ink(drawn) == pytest.approx(pixels / 28**2, rel=0.15)  # pictures are read between their pixels
    assert slant(drawn) == pytest.approx(lean, abs=0.02)


def test_what_is_inverted_is_ink_where_paper_was():
    assert torch.equal(STYLES["inverted"](stroke()), -stroke())
