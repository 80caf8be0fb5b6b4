"""What post-training quantization decides for a product: the scale of its input, and whether 16-bit sums saturate.

Sources: Wu et al. 2020, arXiv:2004.09602 (max, percentile and MSE calibration).

Shapes: R rows (all leading dimensions together), K inputs, N outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from passes.quantization.linear import QMAX, QMIN, weight_scales

ROWS = 256
"""Rows of a layer's input kept from each calibration call, enough to choose a scale by."""

Observer = Literal["max", "percentile", "mse"]


def some_rows(rows: Tensor) -> Tensor:
    """Evenly spaced rows of an input (R, K), and always the row of the largest value."""
    spaced = rows[:: max(1, len(rows) // ROWS)]
    largest = rows[rows.abs().amax(dim=1).argmax()][None]
    return torch.cat([spaced, largest])


def unusable(x: Tensor) -> str:
    """Why no scale can be chosen by an input; empty when one can."""
    if not torch.isfinite(x).all():
        return "its input is not finite on the calibration inputs"
    if float(x.abs().max()) == 0:
        return "its input is zero on the calibration inputs"
    return ""


def scale_of(x: Tensor, *, observer: Observer, percentile: float) -> float:
    """The scale of x (R, K), rounded to 6 digits."""
    magnitude = x.abs()
    if observer == "max":
        limit = float(magnitude.max())
    elif observer == "percentile":
        limit = float(torch.quantile(magnitude.flatten()[: 1 << 23], percentile / 100)) or float(magnitude.max())
    else:
        limit = least_squares_limit(x)
    return float(f"{limit / QMAX:.6g}")


def saturating(x: Tensor, weight: Tensor) -> dict[str, float | bool]:
    """The share of 16-bit sums that saturate in x (R, K) times weight (N, K), and whether 7-bit weights are better."""
    full, reduced, share = saturation(x, weight)
    return {"saturating_share": float(f"{share:.3g}"), "reduced_range": full > reduced}


def least_squares_limit(x: Tensor) -> float:
    """The clipping limit with the least squared rounding and clipping error of x, among 40 shares of its maximum."""
    largest = float(x.abs().max())

    def error(limit: float) -> float:
        scale = limit / QMAX
        return float(((x / scale).round().clamp(QMIN, QMAX) * scale - x).square().sum())

    return min((largest * share / 40 for share in range(40, 0, -1)), key=error)


def saturation(x: Tensor, weight: Tensor, rows: int = 32) -> tuple[float, float, float]:
    """What 16-bit sums of neighbours do to x (R, K) times weight (N, K), by simulating them exactly.

    x86 without VNNI multiplies unsigned by signed bytes and adds neighbours k and k+1 in 16 saturating bits.

    Returns:
        Relative error of the product with 8-bit weights as that processor computes it, with 7-bit weights (where
        nothing can saturate), and the share of sums that saturate.
    """
    x = x[torch.linspace(0, len(x) - 1, min(rows, len(x))).long()]
    if x.shape[1] % 2:
        x, weight = nn.functional.pad(x, (0, 1)), nn.functional.pad(weight, (0, 1))
    weight = weight.detach().float()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    q = (x / step).round().add(zero).clamp(0, 255)  # (R, K) as DynamicQuantizeLinear gives it
    exact = x @ weight.T  # (R, N)
    norm = float(exact.norm()) or 1.0

    scale = weight_scales(weight)  # (N,)
    w = (weight / scale[:, None]).round()  # (N, K)
    product, clipped = torch.zeros_like(exact), 0
    for start in range(0, x.shape[1], 64):
        left, right = q[:, start : start + 64], w[:, start : start + 64]
        terms = left[:, None, :] * right[None]  # (R, N, 64)
        sums = terms[..., 0::2] + terms[..., 1::2]
        held = sums.clamp(-32768, 32767)
        clipped += int((sums != held).sum())
        product += held.sum(dim=2)
    product = (product - zero * w.sum(dim=1)) * step * scale
    halves = (w / 2).round()
    reduced = (q @ halves.T - zero * halves.sum(dim=1)) * step * scale * 2
    pairs = x.shape[0] * x.shape[1] // 2 * weight.shape[0]
    return float((product - exact).norm()) / norm, float((reduced - exact).norm()) / norm, clipped / pairs
