"""What the strokes of digits are measured by: by hand on bars."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from enginewright.reports.benchmarks import style_transfer as style


def bar(width: int) -> Tensor:
    """An upright bar of 20 rows on paper, (1, 1, 28, 28)."""
    picture = torch.full((1, 1, 28, 28), -1.0)
    picture[..., 4:24, 14 - width // 2 : 14 - width // 2 + width] = 1
    return picture


def test_a_wider_bar_has_wider_strokes() -> None:
    widths = [float(style.stroke_width(bar(width).numpy())[0]) for width in (1, 3, 5)]
    assert widths == pytest.approx([2 * 20 * w / (2 * 20 + 2 * w) for w in (1, 3, 5)], rel=0.02)
    assert style.stroke_width(style.bold(bar(1)).numpy()) > style.stroke_width(bar(1).numpy()) + 1


def test_a_slanted_bar_leans_to_the_right() -> None:
    assert style.slant(bar(3).numpy())[0] == pytest.approx(0, abs=0.05)
    assert style.slant(style.slanted(bar(3)).numpy())[0] == pytest.approx(style.LEAN, abs=0.1)


def test_digits_are_drawn_beside_a_reference_that_is_noised_with_them() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x, t, y))
        return torch.zeros(len(x), 2, 28, 28)

    given = style.references("bold")
    noise = torch.randn(len(given), 10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    drawn = style.drawn(net, given, noise, seed=0)  # type: ignore[arg-type]
    assert drawn.shape == noise.shape
    x, t, y = seen[-1]
    assert len(seen) == style.SAMPLER_STEPS
    assert list(y[:11]) == [style.REFERENCES[0], *range(10)]
    assert set(y[44:].tolist()) == {style.NONE}
    assert float(t[0]) == 0
    torch.testing.assert_close(x[0], given[0], atol=0.1, rtol=0)
    assert np.isfinite(drawn.numpy()).all()
