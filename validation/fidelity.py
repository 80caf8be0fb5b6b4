"""How far an engine's outputs are from the original's, output by output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolchain.errors import ToolchainError
from validation.contract import Metric, OutputMetric
from validation.inputs import Array, Arrays
from validation.metrics import load_metrics


@dataclass(frozen=True, kw_only=True)
class OutputFidelity:
    """One output beside the original's.

    Args:
        output: its name.
        worst: metric name -> the worst value over all inputs; NaN as soon as one value is NaN.
    """

    output: str
    worst: Mapping[str, float]


def compare(original_outputs: Sequence[Arrays], candidate_outputs: Sequence[Arrays]) -> list[OutputFidelity]:
    """Every output metric for every output, the worst over the inputs; entry i of both comes from input i.

    Raises:
        ToolchainError: nothing to compare, or an output that is missing, unasked for, or of another shape or dtype.
    """
    if not original_outputs:
        raise ToolchainError("there are no outputs to compare: 0 validation inputs were run")
    pairs = list(zip(original_outputs, candidate_outputs, strict=True))
    for original, candidate in pairs:
        _agree(original, candidate)
    metrics = {name: metric for name, metric in load_metrics().items() if isinstance(metric, OutputMetric)}
    return [
        OutputFidelity(
            output=output,
            worst={
                name: worst(
                    metric, [metric.measure(original[output], candidate[output]) for original, candidate in pairs]
                )
                for name, metric in metrics.items()
            },
        )
        for output in original_outputs[0]
    ]


def worst(metric: Metric, values: Sequence[float]) -> float:
    """The value that speaks most against the candidate; a NaN always does."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return min(values) if metric.higher_is_better else max(values)


def non_finite(outputs: Sequence[Arrays]) -> list[str]:
    """One sentence for each output that holds a NaN or an infinity, counted over all inputs."""
    sentences = []
    for name in {name: None for arrays in outputs for name in arrays}:
        values = [arrays[name] for arrays in outputs if name in arrays]
        nans = sum(int(np.isnan(each).sum()) for each in values)
        infinities = sum(int(np.isinf(each).sum()) for each in values)
        if nans or infinities:
            total = sum(each.size for each in values)
            sentences.append(f"output {name!r} holds {nans} NaN and {infinities} infinite among {total} values")
    return sentences


def _agree(original: Arrays, candidate: Arrays) -> None:
    for name in original:
        if name not in candidate:
            raise ToolchainError(f"output {name!r} is missing; the engine gives {', '.join(candidate) or 'nothing'}")
        _alike(name, original[name], candidate[name])
    for name in candidate:
        if name not in original:
            raise ToolchainError(f"output {name!r} is not one of the original's: {', '.join(original) or 'none'}")


def _alike(name: str, original: Array, candidate: Array) -> None:
    if candidate.shape != original.shape:
        raise ToolchainError(f"output {name!r} has shape {candidate.shape}; the original's is {original.shape}")
    if candidate.dtype != original.dtype:
        raise ToolchainError(f"output {name!r} is {candidate.dtype}; the original's is {original.dtype}")
