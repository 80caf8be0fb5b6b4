"""What post-training quantization decides for a product: the scale of its input, and whether 16-bit sums saturate.

Sources: Wu et al. 2020, arXiv:2004.09602 (max, percentile and MSE calibration).

Shapes: R rows (all leading dimensions together), K inputs, N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.passes.contract import Context, Decision, Facts, Part
from enginewright.passes.kernel.distance import relative_l2
from enginewright.passes.kernel.rounding import QMAX, QMIN, significant, weight_scales
from enginewright.passes.kernel.statistics import Histogram, InputStatistics

ROWS_ABOVE, ROWS_GAIN = 0.01, 0.7
"""A scale for each row takes time, so a layer is marked for it where its relative error with one scale is above the
first, and with one for each row below the second times that."""

Observer = Literal["max", "percentile", "mse"]


class Int8Product(Decision):
    """How a product is computed in 8 bits."""

    precision: Literal["int8"] = Field(description="numbers of the weights and of the input")
    input_scale: float = Field(description="of the input")
    rows: bool = Field(description="whether each row of the input wants a scale of its own")
    saturating_share: float = Field(description="of the 16-bit sums of a CPU that lacks products of bytes")
    reduced_range: bool = Field(description="whether 7-bit weights are better on such a CPU")


class Mix(Part):
    """The values of an input that is one number a sample."""

    samples: int = Field(description="how many")
    quantiles: list[float] = Field(description="their 0, 25, 50, 75 and 100 %")


class CalibrationFacts(Facts):
    """What calibration was on."""

    calibration_calls: int = Field(0, description="calls; none where weights alone decide")
    calibration_mix: dict[str, Mix] = Field({}, description="inputs that are one number a sample, such as a timestep")


def calibration_facts(context: Context) -> CalibrationFacts:
    """What calibration was on."""
    mixes = {}
    for name in context.calibration[0] if context.calibration else ():
        values = [call[name] for call in context.calibration if call[name].ndim == 1]
        if len(values) == len(context.calibration):
            every = torch.cat(values).double()
            quantiles = torch.quantile(every, torch.linspace(0, 1, 5, dtype=torch.float64))
            mixes[name] = Mix(samples=len(every), quantiles=[significant(float(q)) for q in quantiles])
    if not mixes:
        return CalibrationFacts(calibration_calls=len(context.calibration))
    return CalibrationFacts(calibration_calls=len(context.calibration), calibration_mix=mixes)


def unusable(seen: InputStatistics) -> str:
    """Why no scale can be chosen by what was seen of an input; empty when one can."""
    if not seen.sizes.rows:
        return "its input has no rows on the calibration inputs"
    if not seen.sizes.largest.isfinite().all():
        return "its input is not finite on the calibration inputs"
    if float(seen.sizes.largest.max()) == 0:
        return "its input is zero on the calibration inputs"
    return ""


def scale_of(
    seen: InputStatistics, *, observer: Observer, percentile: float, largest: float = QMAX, s: Tensor | None = None
) -> float:
    """The scale of an input for a type with this largest value, rounded to 6 digits; ``mse`` is for int8 alone.

    The largest value and percentiles are of every value of all calls. Least squares, and percentiles of inputs that are
    divided by ``s``, are of the sampled rows.

    Args:
        seen: what was seen of the input.
        observer: how the scale is chosen.
        percentile: of magnitudes, for the observer of that name.
        largest: value of the type.
        s: what channels (K,) are divided by first.
    """
    top = float((seen.sizes.largest if s is None else seen.sizes.largest / s).max())
    sample = seen.sample.rows if s is None else seen.sample.rows / s
    if observer == "max":
        limit = top
    elif observer == "percentile":
        histogram = seen.histogram if s is None else Histogram.of(sample)
        assert histogram is not None, "a percentile needs the histogram of what was seen"
        limit = min(histogram.percentile(percentile), top) or top
    else:
        limit = least_squares_limit(sample, top)
    return significant(limit / largest)


def error_in_8_bits(parts: Iterable[tuple[Tensor, Tensor]], scale: float) -> float:
    """Relative error of products of x (R, K) and weights (N, K), all parts together, with both sides rounded to int8.

    Args:
        parts: rows and weights of each group that is multiplied for itself.
        scale: of x.
    """
    wrong = whole = 0.0
    for x, weight in parts:
        steps = weight_scales(weight)[:, None]
        rounded = (x / scale).round().clamp(QMIN, QMAX) * scale
        exact = x @ weight.T  # (R, N)
        got = rounded @ ((weight / steps).round().clamp(QMIN, QMAX) * steps).T
        wrong, whole = wrong + float((got - exact).square().sum()), whole + float(exact.square().sum())
    return math.sqrt(wrong / whole) if whole else 0.0


def arithmetic(x: Tensor, weight: Tensor, *, products: bool = True) -> dict[str, float | bool]:
    """How a CPU should compute x (R, K) times weight (N, K) in 8 bits.

    Args:
        x: rows met in calibration.
        weight: of the product.
        products: a plain matrix product, whose rows may have scales of their own.

    Returns:
        ``rows``: whether each row should have a scale; ``saturating_share``: of the 16-bit sums; ``reduced_range``:
        whether 7-bit weights are better where sums saturate.
    """
    weight = some_outputs(weight)
    rows = products and gains_by_rows(x, weight)
    full, reduced, share = saturation(x, weight, by_row=rows)
    return {"rows": rows, "saturating_share": float(f"{share:.3g}"), "reduced_range": full > reduced}


OUTPUTS = 2048
"""Outputs of a layer that its arithmetic is judged by: all 12,288 of a large one take seven times as long."""


def some_outputs(weight: Tensor) -> Tensor:
    """Rows of a weight (N, K), evenly spaced, and no more than are judged."""
    return weight[torch.linspace(0, len(weight) - 1, min(OUTPUTS, len(weight))).long()]


def least_squares_limit(x: Tensor, largest: float) -> float:
    """The clipping limit with the least squared rounding and clipping error of x, among 40 shares of the largest value.

    Args:
        x: a sample of what is rounded.
        largest: magnitude of all, the sample's included.
    """

    def error(limit: float) -> float:
        scale = limit / QMAX
        return float(((x / scale).round().clamp(QMIN, QMAX) * scale - x).square().sum())

    return min((largest * share / 40 for share in range(40, 0, -1)), key=error)


def as_bytes(x: Tensor, *, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """X (R, K) as DynamicQuantizeLinear makes it 0 .. 255, with one scale, or one for each row; the scale and zero."""
    low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)  # (R, 1)
    if not by_row:
        low, high = low.min().clamp(max=0), high.max().clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-14)
    zero = -low / step if by_row else (-low / step).round()
    return (x / step + zero).round().clamp(0, 255), step, zero


def gains_by_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether x (R, K) times weight (N, K) is poor with one scale for x in 8 bits, and better with one for each row."""
    weight = weight.detach().float()
    exact = x @ weight.T  # (R, N)

    def error(*, by_row: bool) -> float:
        q, step, zero = as_bytes(x, by_row=by_row)
        return relative_l2(exact, ((q - zero) * step) @ weight.T)

    whole = error(by_row=False)
    return whole > ROWS_ABOVE and error(by_row=True) < ROWS_GAIN * whole


def saturation(x: Tensor, weight: Tensor, rows: int = 32, *, by_row: bool = False) -> tuple[float, float, float]:
    """What 16-bit sums of neighbours do to x (R, K) times weight (N, K), by simulating them exactly.

    x86 without VNNI multiplies unsigned by signed bytes and adds neighbours k and k+1 in 16 saturating bits.

    Returns:
        Relative error of the product with 8-bit weights as that processor computes it, with 7-bit weights (where
        nothing can saturate), and the share of sums that saturate.
    """
    x = x[torch.linspace(0, len(x) - 1, min(rows, len(x))).long()]
    weight = weight.detach().float()
    exact = x @ weight.T  # (R, N)
    q, step, zero = as_bytes(x, by_row=by_row)  # (R, K)
    if x.shape[1] % 2:
        q, weight = nn.functional.pad(q, (0, 1)), nn.functional.pad(weight, (0, 1))

    scale = weight_scales(weight)  # (N,)
    w = (weight / scale[:, None]).round()  # (N, K)
    product, clipped = torch.zeros_like(exact), 0
    for start in range(0, q.shape[1], 64):
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
    return relative_l2(exact, product), relative_l2(exact, reduced), clipped / pairs
