"""Numbers about clouds of numbers: Frechet distance of features, bootstrap intervals of ratios."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


def frechet_distance(a: Array, b: Array) -> float:
    """Frechet distance of two feature clouds a (n, d), b (m, d), each taken as a Gaussian; squared feature units.

    The trace of the square root comes from eigenvalues, so a singular covariance is no obstacle.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return float(means + np.trace(cov_a + cov_b) - 2 * np.sqrt(eigenvalues).sum())
