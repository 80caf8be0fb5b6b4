"""Numbers about clouds of numbers: differences, Frechet distance of features, bootstrap intervals of ratios."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Array

Floats = npt.NDArray[np.float64]


def flat(array: Array) -> Floats:
    """Any shape -> (elements,), in float64."""
    return array.astype(np.float64).ravel()


def difference(original: Array, candidate: Array) -> Floats:
    """Candidate minus original, flat, in float64; NaN where both are infinite with one sign."""
    with np.errstate(invalid="ignore"):
        return flat(candidate) - flat(original)


def check_pair(what: str, original: Array, candidate: Array) -> None:
    """Raise ``ToolchainError`` unless the results of two runs, one a row, can be compared one by one."""
    if original.shape != candidate.shape or not original.size:
        raise ToolchainError(f"{what} of shapes {original.shape} and {candidate.shape} cannot be compared one by one")


def columns(array: Array) -> list[Floats]:
    """An output as tables (rows, columns) in float64, by its last axis; pictures (B, C, H, W) by their channels too.

    Empty for an output without elements; one column for one of fewer than two axes.
    """
    values = array.astype(np.float64)
    if not values.size:
        return []
    if values.ndim < 2:
        return [values.reshape(-1, 1)]
    tables = [values.reshape(-1, values.shape[-1])]
    if values.ndim >= 4:
        tables.append(np.moveaxis(values, 1, -1).reshape(-1, values.shape[1]))
    return tables


def frechet_distance(a: Array, b: Array) -> float:
    """Frechet distance of two feature clouds a (n, d), b (m, d), each taken as a Gaussian; squared feature units.

    The trace of the square root of the product of the two covariances is the sum of the singular values of A B^T, where
    A^T A and B^T B are the covariances: real by construction, no obstacle to a singular covariance, and the clouds are
    never squared. NaN when a feature is not finite.
    """
    ours, real = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(real).all()):
        return float("nan")
    root_a, root_b = _root(ours), _root(real)
    means = np.square(ours.mean(0) - real.mean(0)).sum()
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = float(means + np.square(root_a).sum() + np.square(root_b).sum() - 2 * shared)
    return max(distance, 0.0)  # rounding can leave equal clouds just below


def _root(cloud: Floats) -> Floats:
    """R (at most d, d) of a cloud (n, d), such that R^T R is its covariance."""
    centred = (cloud - cloud.mean(0)) / np.sqrt(max(len(cloud) - 1, 1))
    return np.asarray(np.linalg.qr(centred, mode="r"))


def bootstrap_ratio(
    original: Floats, candidate: Floats, *, seed: int, resamples: int = 4000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of median(candidate) / median(original), resampling whole rounds of paired measurements.

    Source: Efron and Tibshirani 1993, sections 8.6 (blocks) and 13.3 (percentiles). What a machine does to one round
    it does to both runners; drawing rounds, and the same ones for both, keeps that in.

    Args:
        original: (rounds, calls); a round cut short is filled up with NaN.
        candidate: the same shape, from the same rounds.
        seed: the same seed gives the same interval.
        resamples: how many times the rounds are drawn again, with replacement.
        level: share of the resampled ratios inside the interval.
    """
    drawn = _drawn(len(original), resamples, seed)
    ratios = _medians(candidate, drawn) / _medians(original, drawn)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_median(samples: Floats, *, seed: int, resamples: int = 4000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the median of samples (rounds, calls), by the same resampling of whole rounds."""
    medians = _medians(samples, _drawn(len(samples), resamples, seed))
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _drawn(rounds: int, resamples: int, seed: int) -> npt.NDArray[np.int64]:
    """Which rounds each resample holds, (resamples, rounds)."""
    return np.random.default_rng(seed).integers(rounds, size=(resamples, rounds))


def _medians(samples: Floats, drawn: npt.NDArray[np.int64]) -> Floats:
    """The median of each resample, (resamples,)."""
    return np.asarray(np.nanmedian(samples[drawn].reshape(len(drawn), -1), axis=1))
