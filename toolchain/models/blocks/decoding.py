"""Sequences that a decoder with a cache continues: greedy runs, and the calls that one makes.

A decoder takes ``ids`` (n, L) and ``position`` (), where the first of them stands, and gives logits (n, V) of what
follows the last. Shapes: n sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from enginewright.ground.program import Call, Network, Program, StateTensor, Way
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Arrays
from enginewright.passes.networks import Networks
from enginewright.validation.contract import DecodingTask


def with_cache(network: nn.Module, shape: tuple[int, ...]) -> Networks:
    """A network of a sequence, with the keys and values of what went before as state.

    Args:
        network: takes ``position``, ``keys`` and ``values``, and gives its result, and the keys and values of new
            tokens alone.
        shape: of the keys, and of the values, of one sequence; its third axis is of places.
    """
    program = Program(
        networks={"": Network(gives=("keys", "values"))},
        ways=(Way(calls=(Call(network=""),), reads=("keys", "values")),),
        states=tuple(
            StateTensor(name=name, shape=shape, given_as=f"new_{name}", grows=3) for name in ("keys", "values")
        ),
        shared=("position",),
        start="position",
    )
    return Networks({"": network}, program)


def call_of(ids: Array, position: int) -> Arrays:
    """The inputs of one call."""
    return {"ids": ids, "position": np.asarray(position, np.int64)}


def greedy(runner: Runner, prompts: Array, tokens: int) -> Array:
    """Continue prompts (n, L) by the likeliest token each time -> the new ids (n, tokens)."""
    given, position, found = prompts, 0, []
    for _ in range(tokens):
        logits = next(iter(runner(call_of(given, position)).values()))
        position += given.shape[1]
        given = logits.argmax(-1)[:, None]
        found.append(given)
    return np.concatenate(found, axis=1)


def decoding_task(prompts: Callable[[int, int], Array], *, tokens: int, samples: int) -> DecodingTask:
    """Greedy runs from prompts, one sequence at a time, as they are in use.

    Args:
        prompts: (n, seed) -> ids (n, L).
        tokens: how many each is continued by.
        samples: sequences, unless a recipe says otherwise.
    """

    def sample(runner: Runner, n: int, seed: int) -> Array:
        return np.concatenate([greedy(runner, one[None], tokens) for one in prompts(n, seed)])

    return DecodingTask(sample=sample, samples=samples, calls=lambda n: n * tokens)


def steps_of_sequence(vocabulary: int, prompt: int, *, count: int, seed: int) -> list[Arrays]:
    """``count`` calls of one sequence of random ids: a prompt of so many, then a token each."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (1, prompt + count - 1))
    first = call_of(ids[:, :prompt], 0)
    return [first, *(call_of(ids[:, at : at + 1], at) for at in range(prompt, prompt + count - 1))]
