import numpy as np

from enginewright.ground.signature import Dim, InputSpec
from enginewright.validation.inputs import draw

BATCH = Dim(name="batch", low=1, typical=2, high=8)
LATENT = InputSpec(name="latent", shape=(BATCH, 4))
LABEL = InputSpec(name="label", shape=(BATCH,), dtype="int64", low=0, high=10)
TIME = InputSpec(name="t", shape=(BATCH,), low=0.5, high=1.0)


def test_draws_keep_to_shape_dtype_and_range():
    arrays = draw([LATENT, LABEL, TIME], seed=0, sizes={"batch": 500})
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "latent": ((500, 4), "float32"),
        "label": ((500,), "int64"),
        "t": ((500,), "float32"),
    }
    assert set(arrays["label"].tolist()) == set(range(10))
    assert arrays["t"].min() >= 0.5
    assert arrays["t"].max() <= 1.0
    assert abs(arrays["latent"].std() - 1) < 0.1


def test_the_seed_decides():
    first, again, other = (draw([LATENT], seed=seed)["latent"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_limits_are_smallest_typical_and_largest():
    assert LATENT.limits() == ((1, 4), (2, 4), (8, 4))


def test_a_size_that_a_dimension_cannot_have_is_told_with_those_that_it_can() -> None:
    side = Dim(name="height", low=8, typical=16, high=32, multiple_of=8)
    assert side.fault_of(24) == ""
    assert side.fault_of(20) == "height is 20; the model takes multiples of 8 from 8 to 32"
    assert side.fault_of(40) == "height is 40; the model takes multiples of 8 from 8 to 32"
    assert Dim(name="batch", low=1, typical=2, high=4).fault_of(5) == "batch is 5; the model takes 1 to 4"
