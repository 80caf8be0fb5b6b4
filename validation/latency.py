"""Paired timing of the original and its engines, interleaved in one process, and what the samples say.

A shared machine drifts by more than most engines gain, so the runners take turns in short rounds: what slows one
slows the other. PyTorch and ONNX Runtime also disturb each other: after its last call a runtime's worker threads go on
spinning for a while, and its weights fill the caches. Each turn therefore opens with calls that are not counted.

Turns do not cure everything: where other programs take the cores, a runtime whose threads wait for one another stalls
for whole time slices and another does not, so the ratio leans to one side. How often a call was interrupted is counted
beside its time, and a ratio from interrupted calls is called unsafe.

Each runner is timed by the clock of its own device, and gets its inputs on that device: they are placed there once,
before the first call, so that no transfer is timed where a runner can do without.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np

from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Runner, Values, clock_of, inputs_for
from enginewright.ground.signature import Arrays
from enginewright.validation.statistics import Floats, bootstrap_median, bootstrap_ratio

BLOCK = 3
"""Counted calls of a turn. Fewer spend more time on uncounted calls; more leave fewer rounds to resample."""

SETTLE_S = 0.05
"""Uncounted calls at the start of a turn fill at least this time, meant to outlast the other runtime's spinning."""

UNSAFE_SPREAD = 0.2
FEWEST_SAMPLES = 10
FEWEST_ROUNDS = 8
"""Rounds are what is resampled: below 8 a 95 % interval holds the true ratio less often than it says (4: 89 %)."""

SLICE_S = 0.003
"""What one interruption costs, about: the time for which Linux lets the other program run (its base slice)."""

UNSAFE_INTERRUPTED = 0.1
"""Share of a call's time that interruptions may cost by that estimate before its ratio is unsafe."""

OUTLIER_DEVIATIONS = 10.0
"""In robust standard deviations, 1.4826 times the median absolute deviation; hyperfine's threshold."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What was taken down of each counted call of one runner, in the order of the calls.

    Args:
        wall_s: its time.
        cpu_s: processor time of the whole process in it, all threads together.
        interrupted: how often the system took a core from a thread of this process; empty where it does not say.
    """

    wall_s: list[float]
    cpu_s: list[float]
    interrupted: list[int]


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
        original_low_s: lower end of the 95 % bootstrap interval of the original's median.
        original_high_s: upper end.
        unsafe: why nothing may rest on the ratio; empty when it may.
        warnings: doubts, in words; those of ``unsafe`` among them.
    """

    median_s: float
    p90_s: float
    p99_s: float
    original_median_s: float
    spread: float
    ratio: float
    ratio_low: float
    ratio_high: float
    original_low_s: float
    original_high_s: float
    unsafe: list[str]
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
    """Seconds of every counted call of each runner, in the order of the calls; see ``time_in_turns``."""
    taken = time_in_turns(
        runners, inputs, warm_up=warm_up, samples=samples, seed=seed, say=say, block=block, settle_s=settle_s
    )
    return {name: each.wall_s for name, each in taken.items()}


def time_in_turns(
    runners: Mapping[str, Runner],
    inputs: Arrays,
    *,
    warm_up: int,
    samples: int,
    seed: int,
    say: Callable[[str], None] = _silent,
    block: int = BLOCK,
    settle_s: float = SETTLE_S,
) -> dict[str, Samples]:
    """Time every counted call of each runner, and take down what else it cost.

    Args:
        runners: by name, the original among them.
        inputs: what every call gets; placed once on the device of each runner that takes tensors there.
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
    given = {name: inputs_for(runner, inputs) for name, runner in runners.items()}
    for name, runner in runners.items():
        say(f"warming up {name}")
        for _ in range(warm_up):
            runner(given[name])
        clock_of(runner)()  # what was launched is done before another runner starts

    order, shuffle = list(runners), random.Random(seed).shuffle
    taken = {name: Samples(wall_s=[], cpu_s=[], interrupted=[]) for name in runners}
    last = None
    rounds = -(-samples // block)
    with _collected_once():
        for turn in range(rounds):
            say(f"timing round {turn + 1} of {rounds}")
            shuffle(order)
            with _no_collection():
                for name in order:
                    if name != last:
                        _settle(runners[name], given[name], settle_s)
                        last = name
                    for _ in range(min(block, samples - len(taken[name].wall_s))):
                        _time_call(runners[name], given[name], taken[name])
    return taken


def summarise(
    original: Sequence[float] | Samples, candidate: Sequence[float] | Samples, *, seed: int, block: int = BLOCK
) -> LatencySummary:
    """Summary of paired samples (seconds) from one run in turns with the same ``block``.

    Bare seconds say nothing about interruptions, so contention is seen in ``Samples`` alone.
    """
    theirs, ours = _walls(original), _walls(candidate)
    if not len(ours) or len(ours) != len(theirs):
        raise ValueError(f"samples must come in pairs: {len(theirs)} of the original, {len(ours)} of the candidate")
    low, high = bootstrap_ratio(_rounds(theirs, block), _rounds(ours, block), seed=seed)
    original_low, original_high = bootstrap_median(_rounds(theirs, block), seed=seed)
    middle, p90, p99 = (float(value) for value in np.percentile(ours, [50, 90, 99]))
    original_median = float(np.median(theirs))
    unsafe = [
        *_too_few(len(ours), block),
        *_too_wide("the original", theirs),
        *_too_wide("the engine", ours),
        *_contention("the original", original),
        *_contention("the engine", candidate),
    ]
    doubts = [*_outliers("the original", theirs), *_outliers("the engine", ours), *_no_difference(low, high)]
    return LatencySummary(
        median_s=middle,
        p90_s=p90,
        p99_s=p99,
        original_median_s=original_median,
        spread=_spread(ours),
        ratio=middle / original_median,
        ratio_low=low,
        ratio_high=high,
        original_low_s=original_low,
        original_high_s=original_high,
        unsafe=unsafe,
        warnings=[*unsafe, *doubts],
    )


def _walls(samples: Sequence[float] | Samples) -> Floats:
    return np.asarray(samples.wall_s if isinstance(samples, Samples) else samples, np.float64)


def _check_counts(runners: Mapping[str, Runner], warm_up: int, samples: int, block: int) -> None:
    if not runners:
        raise ToolchainError("there is nothing to time: 0 runners")
    for name, value, least in (("warm_up", warm_up, 0), ("samples", samples, 1), ("block", block, 1)):
        if value < least:
            raise ToolchainError(f"{name} is {value}; timing needs at least {least}")


@contextmanager
def _collected_once() -> Iterator[None]:
    """Collect all garbage once; until the end of the block a collection looks only at what was made since.

    Looking at all modules of a process takes as long as hundreds of short calls, and would be done in every round.
    """
    frozen = gc.get_freeze_count() > 0
    gc.collect()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


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


def _settle(runner: Runner, inputs: Values, settle_s: float) -> None:
    clock = clock_of(runner)
    end = clock() + settle_s
    runner(inputs)
    while clock() < end:
        runner(inputs)


def _time_call(runner: Runner, inputs: Values, taken: Samples) -> None:
    """Run once; the clocks that are not the result's own are read outside of it."""
    clock = clock_of(runner)
    interrupted, cpu = _interruptions(), time.process_time()
    start = clock()
    runner(inputs)
    taken.wall_s.append(clock() - start)
    taken.cpu_s.append(time.process_time() - cpu)
    after = _interruptions()
    if interrupted is not None and after is not None:
        taken.interrupted.append(after - interrupted)


def _interruptions() -> int | None:
    """How often the system has taken a core from a thread of this process so far; None where it does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


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


def _too_wide(who: str, samples: Floats) -> list[str]:
    spread = _spread(samples)
    if spread <= UNSAFE_SPREAD:
        return []
    return [
        f"the spread of {who} is {spread:.0%} of its median, above {UNSAFE_SPREAD:.0%}: the ratio is unsafe; "
        "close other programs or ask for more samples"
    ]


def _contention(who: str, samples: Sequence[float] | Samples) -> list[str]:
    """Whether other programs took the cores, call by call: the median call counts, so a rare one does no harm."""
    if not isinstance(samples, Samples) or not samples.interrupted:
        return []
    lost = median(
        times * SLICE_S / max(wall, SLICE_S) for times, wall in zip(samples.interrupted, samples.wall_s, strict=True)
    )
    if lost <= UNSAFE_INTERRUPTED:
        return []
    hit = sum(times > 0 for times in samples.interrupted)
    return [
        f"other programs interrupted {who} in {hit} of {len(samples.wall_s)} calls, {median(samples.interrupted):g} "
        "times in a middling one: the ratio is unsafe; close other programs, or give it fewer threads than cores"
    ]


def _outliers(who: str, samples: Floats) -> list[str]:
    outliers = count_outliers(samples)
    if not outliers:
        return []
    return [f"{outliers} of {len(samples)} samples of {who} are outliers; something else ran beside it"]


def _no_difference(low: float, high: float) -> list[str]:
    if low <= 1 <= high:
        return [f"no measurable difference: the ratio's interval, {low:.3f} to {high:.3f}, contains 1"]
    return []


def count_outliers(samples: Floats) -> int:
    """How many samples lie far from the median, measured in median absolute deviations (no normal tails assumed)."""
    away = np.abs(samples - np.median(samples))
    return int((away > OUTLIER_DEVIATIONS * 1.4826 * np.median(away)).sum())
