"""Numbers about clouds of numbers: differences, Frechet distance of features, bootstrap intervals of ratios."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from validation.inputs import Array

Floats = npt.NDArray[np.float64]


def flat(array: Array) -> Floats:
    """Any shape -> (elements,), in float64."""
    return array.astype(np.float64).ravel()


def difference(original: Array, candidate: Array) -> Floats:
    """Candidate minus original, flat, in float64; NaN where both are infinite with one sign."""
    with np.errstate(invalid="ignore"):
        return flat(candidate) - flat(original)


def frechet_distance(a: Array, b: Array) -> float:
    """Frechet distance of two feature clouds a (n, d), b (m, d), each taken as a Gaussian; squared feature units.

    The trace of the square root comes from eigenvalues, so a singular covariance is no obstacle. NaN when a feature
    is not finite.
    """
    ours, real = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(real).all()):
        return float("nan")
    cov_a, cov_b = np.atleast_2d(np.cov(ours, rowvar=False)), np.atleast_2d(np.cov(real, rowvar=False))
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    means = np.square(ours.mean(0) - real.mean(0)).sum()
    distance = float(means + np.trace(cov_a + cov_b) - 2 * np.sqrt(eigenvalues).sum())
    return max(distance, 0.0)  # rounding can leave equal clouds just below


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
    rounds = len(original)
    drawn = np.random.default_rng(seed).integers(rounds, size=(resamples, rounds))

    def medians(samples: Floats) -> Floats:
        return np.asarray(np.nanmedian(samples[drawn].reshape(resamples, -1), axis=1))  # (resamples,)

    low, high = np.quantile(medians(candidate) / medians(original), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
