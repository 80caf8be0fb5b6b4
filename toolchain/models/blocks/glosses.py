"""What is measured on networks that read text: whether they tell which part of speech a dictionary's gloss is of.

Glosses are those of WordNet 3.0 without their examples, as bytes. ``weights/glosses-test.txt`` holds 1,000 that nothing
was trained on, in turns of the four classes, below WordNet's own licence.

Shapes: n glosses, N bytes of the longest.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Arrays
from enginewright.models.blocks.digits import WEIGHTS
from enginewright.validation.contract import ClassifyingTask

CLASSES = ("noun", "verb", "adj", "adv")
LONGEST = 128
"""Bytes of a gloss that are read; later ones are cut off."""

PADDING = 256
JUDGED = 800
"""Of the glosses held out, those that accuracy is measured on; calibration may look at the others."""

AT_ONCE = 4
"""Glosses of a call: a network's signature takes no more."""


def call_of(glosses: Iterable[str]) -> Arrays:
    """The input of a call: ids (n, N), padded at the end, and the mask (n, N) of what is no padding."""
    read = [gloss.encode()[:LONGEST] for gloss in glosses]
    ids = np.full((len(read), max(map(len, read))), PADDING, dtype=np.int64)
    for row, codes in zip(ids, read, strict=True):
        row[: len(codes)] = np.frombuffer(codes, dtype=np.uint8)
    return {"ids": ids, "mask": ids != PADDING}


@cache
def held_out() -> tuple[tuple[str, ...], Array]:
    """Glosses that nothing was trained on, and their classes (1000,)."""
    lines = (WEIGHTS / "glosses-test.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if "\t" in line]  # the licence has no tabs
    return tuple(gloss for _, gloss in rows), np.array([CLASSES.index(name) for name, _ in rows])


def gloss_task() -> ClassifyingTask:
    """Tell the part of speech of glosses that were held out."""
    return ClassifyingTask(sample=told, samples=JUDGED, calls=lambda n: -(-n // AT_ONCE))


def told(runner: Runner, n: int, seed: int) -> Array:
    """The classes that a runner tells of n glosses, none twice while there are others, and the true ones, (n, 2)."""
    glosses, classes = held_out()
    rows = np.random.default_rng(seed).permutation(JUDGED)[np.arange(n) % JUDGED]
    parts = [rows[start : start + AT_ONCE] for start in range(0, n, AT_ONCE)]
    read = [next(iter(runner(call_of(glosses[row] for row in part)).values())).argmax(axis=1) for part in parts]
    return np.stack([np.concatenate(read), classes[rows]], axis=1)


def unjudged(count: int, seed: int, batch: int = 2) -> list[Arrays]:
    """``count`` calls of ``batch`` glosses that are neither trained on nor judged."""
    glosses, _ = held_out()
    generator = np.random.default_rng(seed)
    return [call_of(generator.choice(glosses[JUDGED:], batch, replace=False)) for _ in range(count)]
