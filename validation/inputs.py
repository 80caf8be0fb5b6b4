"""Arrays drawn from the inputs that a model declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from enginewright.ground.signature import Array, Arrays, Dim, InputSpec


def draw(specs: Sequence[InputSpec], *, seed: int, sizes: Mapping[str, int] | None = None) -> Arrays:
    """Random inputs that keep to the specs; the same seed gives the same arrays on every machine."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for spec in specs:
        shape, dtype = spec.sizes(sizes), np.dtype(spec.dtype)
        if spec.default is not None and not spec.drawn:
            arrays[spec.name] = np.full(shape, spec.default, dtype)
        elif dtype.kind == "b" and (spec.low is None or spec.high is None):
            arrays[spec.name] = mixed(rng, shape)
        elif spec.low is None or spec.high is None:
            arrays[spec.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind in "iub":
            arrays[spec.name] = rng.integers(int(spec.low), int(spec.high), shape).astype(dtype)
        else:
            arrays[spec.name] = rng.uniform(spec.low, spec.high, shape).astype(dtype)
        if spec.corners:
            arrays[spec.name] = sorted_corners(arrays[spec.name])
    return arrays


def mixed(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Booleans of both values, mostly true; where a last axis has room for it, every row of it starts with a true one.

    A mask like that hides something, but from no row everything, which many networks answer with NaN.
    """
    found = np.asarray(rng.standard_normal(shape) > -0.5)
    if found.size > 1:
        found.reshape(-1)[-1] = False
        if shape[-1] > 1:
            found[..., 0] = True
        else:
            found.reshape(-1)[0] = True
    return found


def sorted_corners(boxes: Array) -> Array:
    """Boxes (..., 4) of two corners each, as (smaller x, smaller y, larger x, larger y)."""
    pairs = boxes.reshape(*boxes.shape[:-1], 2, 2)
    return np.sort(pairs, axis=-2).reshape(boxes.shape)


def completed(given: Mapping[str, Array], specs: Sequence[InputSpec]) -> Arrays:
    """A call with the inputs that it leaves out at their defaults, as large as the given ones ask."""
    sizes = {
        d.name: size
        for spec in specs
        if spec.name in given
        for d, size in zip(spec.shape, given[spec.name].shape, strict=True)
        if isinstance(d, Dim)
    }
    absent = [replace(spec, drawn=False) for spec in specs if spec.default is not None and spec.name not in given]
    return {**given, **draw(absent, seed=0, sizes=sizes)}
