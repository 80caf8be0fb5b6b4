"""AWQ: enlarge the weights of the inputs that matter before rounding, by the power of their size that serves best.

Source: Lin et al. 2023, arXiv:2306.00978, section 3.2, equations 4 and 5: s = (mean |x|)^a, with a searched in 20
steps for the least error of the output; s is divided by the root of its largest times its smallest, as in the
authors' code. Departures: no clipping of weights; layers that read the same are searched together, by the sum of
their relative errors.

Shapes: R rows, K inputs, N outputs, B inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.quantization.blocks import Weights, in_blocks

STEPS = 20


def awq_factors(
    matrices: Sequence[Tensor], seen: Sequence[InputStatistics], weights: Weights, block: int
) -> Tensor | None:
    """What input channels are divided by, (K,), for weights (K, N) that read the same; None where nothing helps.

    Sizes are means over all rows of all calls; errors are those on the sampled rows.
    """
    size = torch.stack([each.sizes.mean for each in seen]).mean(dim=0).clamp(min=1e-8)
    rows = [each.sample.rows for each in seen]
    best, least = None, errors(matrices, rows, None, weights, block)
    for step in range(1, STEPS):
        s = size.pow(step / STEPS)
        s = s / (s.max() * s.min()).sqrt()
        if (error := errors(matrices, rows, s, weights, block)) < least:
            best, least = s, error
    return best


def errors(matrices: Sequence[Tensor], rows: Sequence[Tensor], s: Tensor | None, weights: Weights, block: int) -> float:
    """Sum of the relative squared errors of the products when channels are divided by s."""
    total = 0.0
    for weight, x in zip(matrices, rows, strict=True):
        scaled = weight if s is None else weight * s[:, None]
        values = in_blocks(scaled, weights, block).values()
        exact = x @ weight
        found = (x if s is None else x / s) @ values
        total += float((found - exact).square().sum() / exact.square().sum().clamp(min=1e-12))
    return total
