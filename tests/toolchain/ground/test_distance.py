import math

import numpy as np
import pytest
import torch

from enginewright.ground.distance import relative_l2
from enginewright.passes.kernel import distance

FORMS = [relative_l2, lambda a, b: distance.relative_l2(torch.from_numpy(a), torch.from_numpy(b))]


@pytest.mark.parametrize("measure", FORMS, ids=["arrays", "tensors"])
@pytest.mark.parametrize(
    ("original", "candidate", "wanted"),
    [
        ([3.0, 4.0], [3.0, 4.5], 0.1),
        ([[3.0], [4.0]], [[6.0], [8.0]], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [1e-9, 0.0], math.inf),
        ([1e4, 1.0], [1e4, 2.0], 1e-4),
    ],
)
def test_it_is_the_length_of_the_error_beside_that_of_the_original(measure, original, candidate, wanted):
    found = measure(np.array(original, np.float32), np.array(candidate, np.float32))
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("measure", FORMS, ids=["arrays", "tensors"])
def test_half_precision_does_not_overflow_and_what_is_not_finite_is_seen(measure):
    large = np.full(8, 6e4, np.float16)
    assert measure(large, large) == 0
    assert measure(large, (large * 0.5).astype(np.float16)) == pytest.approx(0.5)
    assert not math.isfinite(measure(np.ones(2, np.float32), np.array([1, np.nan], np.float32)))
    assert not math.isfinite(measure(np.ones(2, np.float32), np.array([1, np.inf], np.float32)))
