"""The one measure of how far an answer is from the original's, beside the size of the original's."""

from __future__ import annotations

import numpy as np

from enginewright.ground.signature import Array


def relative_l2(original: Array, candidate: Array) -> float:
    """||a - b|| / ||b|| with b the original; both norms over all elements, in double precision.

    0 when equal, also when both are zero; infinite when only the original is zero. Both have one shape.
    """
    wanted, got = (np.asarray(array).astype(np.float64).ravel() for array in (original, candidate))
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.linalg.norm(got - wanted)
        if error == 0:
            return 0.0
        return float(error / np.linalg.norm(wanted))
