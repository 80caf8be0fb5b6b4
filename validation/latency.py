"""Paired timing of the original and its engines, interleaved in one process, and what the samples say.

A shared machine drifts by more than most engines gain, so the runners take turns in short rounds: what slows one
slows the other. PyTorch and ONNX Runtime also disturb each other: after its last call a runtime's worker threads go on
spinning for a while, and its weights fill the caches. Each turn therefore opens with calls that are not counted.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from toolchain.errors import ToolchainError
from validation.contract import Runner
from validation.inputs import Arrays
from validation.statistics import Floats, bootstrap_ratio

BLOCK = 3
"""Counted calls of a turn. Fewer spend more time on uncounted calls; more leave fewer rounds to resample."""

SETTLE_S = 0.05
"""Uncounted calls at the start of a turn fill at least this time, meant to outlast the other runtime's spinning."""

UNSAFE_SPREAD = 0.2
FEWEST_SAMPLES = 10
FEWEST_ROUNDS = 4
OUTLIER_DEVIATIONS = 10.0
"""In robust standard deviations, 1.4826 times the median absolute deviation; hyperfine's threshold."""


@dataclass(frozen=True, kw_only=True)
class LatencySummary:
    """What the samples of a candidate and of the original beside it say; times in seconds.

    Args:
        median_s: of the candidate; so are ``p90_s``, ``p99_s`` and ``spread``.
        p90_s: 90th percentile.
        p99_s: 99th percentile.
        original_median_s: of the original.
        spread: interquartile range over median.
        ratio: candidate's median over the original's; below 1 the candidate is faster.
        ratio_low: lower end of the ratio's 95 % bootstrap interval.
        ratio_high: upper end.
        warnings: doubts, in words.
    """

    median_s: float
    p90_s: float
    p99_s: float
    original_median_s: float
    spread: float
    ratio: float
    ratio_low: float
    ratio_high: float
    warnings: list[str]


def _silent(text: str) -> None:
    """Say nothing."""


def time_interleaved(
    runners: Mapping[str, Runner],
    inputs: Arrays,
    *,
    warm_up: int,
    samples: int,
    seed: int,
    say: Callable[[str], None] = _silent,
    block: int = BLOCK,
    settle_s: float = SETTLE_S,
) -> dict[str, list[float]]:
    """Seconds of every counted call of each runner, in the order of the calls.

    Args:
        runners: by name, the original among them.
        inputs: what every call gets.
        warm_up: uncounted calls of each runner before the first round.
        samples: counted calls of each runner.
        seed: of the order in which the runners take their turns, drawn anew for each round.
        say: hears about progress.
        block: counted calls of a turn; the last round may have fewer. ``summarise`` must know it.
        settle_s: after a switch from another runner, uncounted calls fill this time; it is one call at least.

    Raises:
        ToolchainError: no runner, or a count that is too small.
    """
    _check_counts(runners, warm_up, samples, block)
    for name, runner in runners.items():
        say(f"warming up {name}")
        for _ in range(warm_up):
            runner(inputs)

    order, shuffle = list(runners), random.Random(seed).shuffle
    taken: dict[str, list[float]] = {name: [] for name in runners}
    last = None
    rounds = -(-samples // block)
    for turn in range(rounds):
        say(f"timing round {turn + 1} of {rounds}")
        shuffle(order)
        with _no_collection():
            for name in order:
                if name != last:
                    _settle(runners[name], inputs, settle_s)
                    last = name
                calls = min(block, samples - len(taken[name]))
                taken[name] += [_timed(runners[name], inputs) for _ in range(calls)]
    return taken


def summarise(
    original: Sequence[float], candidate: Sequence[float], *, seed: int, block: int = BLOCK
) -> LatencySummary:
    """Summary of paired samples (seconds) from one ``time_interleaved`` with the same ``block``."""
    theirs, ours = np.asarray(original, np.float64), np.asarray(candidate, np.float64)
    if not len(ours) or len(ours) != len(theirs):
        raise ValueError(f"samples must come in pairs: {len(theirs)} of the original, {len(ours)} of the candidate")
    low, high = bootstrap_ratio(_rounds(theirs, block), _rounds(ours, block), seed=seed)
    median, p90, p99 = (float(value) for value in np.percentile(ours, [50, 90, 99]))
    original_median = float(np.median(theirs))
    return LatencySummary(
        median_s=median,
        p90_s=p90,
        p99_s=p99,
        original_median_s=original_median,
        spread=_spread(ours),
        ratio=median / original_median,
        ratio_low=low,
        ratio_high=high,
        warnings=[
            *_too_few(len(ours), block),
            *_noise("the original", theirs),
            *_noise("the engine", ours),
            *_no_difference(low, high),
        ],
    )


def _check_counts(runners: Mapping[str, Runner], warm_up: int, samples: int, block: int) -> None:
    if not runners:
        raise ToolchainError("there is nothing to time: 0 runners")
    for name, value, least in (("warm_up", warm_up, 0), ("samples", samples, 1), ("block", block, 1)):
        if value < least:
            raise ToolchainError(f"{name} is {value}; timing needs at least {least}")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and not again until the end of the block."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _settle(runner: Runner, inputs: Arrays, settle_s: float) -> None:
    end = time.perf_counter() + settle_s
    runner(inputs)
    while time.perf_counter() < end:
        runner(inputs)


def _timed(runner: Runner, inputs: Arrays) -> float:
    start = time.perf_counter()
    runner(inputs)
    return time.perf_counter() - start


def _rounds(samples: Floats, block: int) -> Floats:
    """(samples,) -> (rounds, block), the last round filled up with NaN."""
    missing = -len(samples) % block
    return np.pad(samples, (0, missing), constant_values=np.nan).reshape(-1, block)


def _spread(samples: Floats) -> float:
    low, median, high = np.percentile(samples, [25, 50, 75])
    return float((high - low) / median)


def _too_few(samples: int, block: int) -> list[str]:
    rounds = -(-samples // block)
    if samples >= FEWEST_SAMPLES and rounds >= FEWEST_ROUNDS:
        return []
    return [f"{samples} samples in {rounds} rounds are too few for a trustworthy interval; ask for 30"]


def _noise(who: str, samples: Floats) -> list[str]:
    """Doubts about one runner's samples."""
    doubts = []
    spread = _spread(samples)
    if spread > UNSAFE_SPREAD:
        doubts.append(
            f"the spread of {who} is {spread:.0%} of its median, above {UNSAFE_SPREAD:.0%}: the ratio is unsafe; "
            "close other programs or ask for more samples"
        )
    outliers = count_outliers(samples)
    if outliers:
        doubts.append(f"{outliers} of {len(samples)} samples of {who} are outliers; something else ran beside it")
    return doubts


def _no_difference(low: float, high: float) -> list[str]:
    if low <= 1 <= high:
        return [f"no measurable difference: the ratio's interval, {low:.3f} to {high:.3f}, contains 1"]
    return []


def count_outliers(samples: Floats) -> int:
    """How many samples lie far from the median, measured in median absolute deviations (no normal tails assumed)."""
    away = np.abs(samples - np.median(samples))
    return int((away > OUTLIER_DEVIATIONS * 1.4826 * np.median(away)).sum())
