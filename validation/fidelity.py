"""How far an engine's outputs are from the original's, output by output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Array, Arrays
from enginewright.validation.contract import Metric, OutputMetric
from enginewright.validation.metrics import load_metrics
from enginewright.validation.statistics import Floats, columns

TOKEN_SCORES = ("start_logits", "end_logits")
"""Outputs (B, N) with a value for each token. Other outputs of two axes that fit a mask (B, N) fit it by chance."""

FEWEST_ROWS = 8
"""Fewer rows of a column say nothing about whether it is dead."""

LEAST_SPREAD = 1e-4
"""A column varies when its spread is above this part of the whole output's: below is rounding."""


@dataclass(frozen=True, kw_only=True)
class OutputFidelity:
    """One output beside the original's.

    Args:
        output: its name.
        worst: metric name -> the worst value over all inputs; NaN as soon as one value is NaN.
        calls: how many calls had anything to compare.
        worst_call: the call that is furthest off in ``relative_l2``, counted from 1.
        median: metric name -> the value in the middle of the calls.
        masked: whether a mask left rows out of all of the above.
        everywhere: metric name -> the worst value over all rows; empty when no mask left any out.
    """

    output: str
    worst: Mapping[str, float]
    calls: int | None = None
    worst_call: int | None = None
    median: Mapping[str, float] = field(default_factory=dict)
    masked: bool = False
    everywhere: Mapping[str, float] = field(default_factory=dict)


def compare(
    original_outputs: Sequence[Arrays], candidate_outputs: Sequence[Arrays], masks: Sequence[Array | None] = ()
) -> list[OutputFidelity]:
    """Every output metric for every output, the worst over the inputs; entry i of both comes from input i.

    An output without a single element in any call is left out: nothing was compared. See ``empty``.

    Args:
        original_outputs: of each call.
        candidate_outputs: of each call.
        masks: for each call which rows are real, (B, N), or None; outputs (B, N, ...) are judged by those rows.

    Raises:
        ToolchainError: nothing to compare, or an output that is missing, unasked for, or of another shape or dtype.
    """
    if not original_outputs:
        raise ToolchainError("there are no outputs to compare: 0 validation inputs were run")
    pairs = list(zip(original_outputs, candidate_outputs, strict=True))
    for original, candidate in pairs:
        _agree(original, candidate)
    metrics = {name: metric for name, metric in load_metrics().items() if isinstance(metric, OutputMetric)}
    given = list(masks) or [None] * len(pairs)
    found = (_of_output(name, pairs, given, metrics) for name in original_outputs[0])
    return [each for each in found if each is not None]


def _of_output(
    name: str,
    pairs: Sequence[tuple[Arrays, Arrays]],
    masks: Sequence[Array | None],
    metrics: Mapping[str, OutputMetric],
) -> OutputFidelity | None:
    whole = [(original[name], candidate[name]) for original, candidate in pairs]
    real = [(_real(name, b, mask), _real(name, a, mask)) for (b, a), mask in zip(whole, masks, strict=True)]
    compared = {number: pair for number, pair in enumerate(real, 1) if pair[0].size}
    if not compared:
        return None
    values = {label: [metric.measure(*pair) for pair in compared.values()] for label, metric in metrics.items()}
    masked = any(b.size < every.size for (b, _), (every, _) in zip(real, whole, strict=True))
    return OutputFidelity(
        output=name,
        worst={label: worst(metrics[label], found) for label, found in values.items()},
        calls=len(compared),
        worst_call=list(compared)[int(np.argmax(values["relative_l2"]))],  # a NaN is the largest
        median={label: _median(found) for label, found in values.items()},
        masked=masked,
        everywhere={
            label: worst(metric, [metric.measure(*pair) for pair in whole if pair[0].size])
            for label, metric in (metrics.items() if masked else ())
        },
    )


def _median(values: Sequence[float]) -> float:
    """The middle value; the lower of the two middle ones of an even count, as two infinities have no mean."""
    return math.nan if any(map(math.isnan, values)) else sorted(values)[(len(values) - 1) // 2]


def _real(name: str, output: Array, mask: Array | None) -> Array:
    """The rows (rows, ...) of an output (B, N, ...) that its mask keeps; all of it where it has no such rows."""
    if mask is None or output.shape[:2] != mask.shape or (output.ndim == 2 and name not in TOKEN_SCORES):
        return output
    return output[mask.astype(bool)]


def real_rows(original: Arrays, candidate: Arrays, mask: Array | None) -> tuple[Arrays, Arrays]:
    """Both sides' outputs, only the rows that a mask keeps; what is missing or of another shape stays whole."""
    like = [name for name, wanted in original.items() if name in candidate and candidate[name].shape == wanted.shape]
    kept = ({name: _real(name, side[name], mask) for name in like} for side in (original, candidate))
    wanted, got = kept
    return {**original, **wanted}, {**candidate, **got}


def empty(outputs: Sequence[Arrays], masks: Sequence[Array | None] = ()) -> list[str]:
    """Outputs without a single element to compare in any call."""
    given = list(masks) or [None] * len(outputs)
    return [
        name
        for name in outputs[0]
        if not any(_real(name, each[name], mask).size for each, mask in zip(outputs, given, strict=True))
    ]


def dead_columns(
    original_outputs: Sequence[Arrays], candidate_outputs: Sequence[Arrays], masks: Sequence[Array | None] = ()
) -> list[str]:
    """One sentence for each output in which a column that varies in the original never changes in the engine.

    A column is a place of the last axis, in pictures (B, C, H, W) a channel. What moves in few rows, or by less than
    ``LEAST_SPREAD``, does not count as varying.
    """
    given = list(masks) or [None] * len(original_outputs)
    sentences = []
    for name in original_outputs[0]:
        theirs, ours = (list(_tables(name, outputs, given)) for outputs in (original_outputs, candidate_outputs))
        if not theirs or len({table.shape[1] for table in theirs}) > 1:
            continue
        original, candidate = np.concatenate(theirs), np.concatenate(ours)
        dead = np.flatnonzero(_varies(original) & (np.ptp(candidate, axis=0) == 0))
        if len(dead):
            shown = ", ".join(str(number) for number in dead[:8]) + (", ..." if len(dead) > 8 else "")
            sentences.append(
                f"output {name!r} has dead columns: {shown} ({len(dead)} of {original.shape[1]}, counted from 0) vary "
                "in the original and never change in the engine"
            )
    return sentences


def _tables(name: str, outputs: Sequence[Arrays], masks: Sequence[Array | None]) -> Iterator[Floats]:
    """The rows of each call that are worth a look, (rows, columns)."""
    for each, mask in zip(outputs, masks, strict=True):
        if each[name].dtype.kind in "iuf" and (tables := columns(_real(name, each[name], mask))):
            yield tables[-1]


def _varies(table: Floats) -> npt.NDArray[np.bool_]:
    """(rows, columns) -> whether a column moves, in more than a few rows and by more than rounding, (columns,)."""
    if len(table) < FEWEST_ROWS or not np.isfinite(table).all():
        return np.zeros(table.shape[1], np.bool_)
    width = np.ptp(table, axis=0)
    away = np.abs(table - np.median(table, axis=0)) > 0.05 * width
    moves = away.sum(axis=0) >= max(3, len(table) / 10)
    return np.asarray(moves & (table.std(axis=0) > LEAST_SPREAD * max(table.std(), 1e-300)))


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
