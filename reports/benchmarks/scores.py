"""Scores of weights that ship, on what was drawn for this alone; and how time grows with length."""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import nn

from enginewright import sources
from enginewright.models.blocks.sequences import TASKS
from enginewright.models.blocks.transformer import Block
from enginewright.models.vision import fit
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.training.transformer_programs import accuracy
from enginewright.validation.contract import ClassifyingTask
from enginewright.validation.metrics.accuracy import Accuracy

SEQUENCES, SEED = 5_000, 77
SHORT, LONG, GROUP = 1_024, 16_384, 256
"""Tokens of the shorter and of the longer input, and of a group of FIT's."""
WIDTH, HEADS, LAYERS, CALLS = 192, 3, 4, 5


def labels_right(size: str) -> float:
    """The share of labels that a Transformer Program of this size gets right, sequences of all lengths alike."""
    program = sources.load(f"transformer_programs:{size}").module
    return accuracy(program, *TASKS[size].sequences(SEQUENCES, seed=SEED))  # type: ignore[arg-type]


def points_behind(size: str) -> float:
    """How far one of the networks that read glosses is behind the other one's share told right, 800 held out."""
    right = {each: _right(f"wide_attention:{each}") for each in ("glosses-wide", "glosses-deep")}
    return max(right.values()) - right[size]


def _right(model: str) -> float:
    """The share of what is held out whose class a network that ships tells."""
    loaded = sources.load(model)
    task = loaded.task
    assert isinstance(task, ClassifyingTask)
    told = task.sample(EagerRunner(loaded.module, threads=torch.get_num_threads(), outputs=loaded.outputs), 800, SEED)
    return Accuracy().measure(task, told, told)


def power_of_length(kind: str) -> float:
    """The power of the number of tokens with which a network's time grows, from 1,024 to 16,384 of them.

    Args:
        kind: "fit": local layers in groups of 256 and as many layers over 16 latents of each group, in two turns;
            "plain": as many layers as the local ones, each over all tokens. Weights are random.
    """
    short, long = (_seconds(*_network(kind, tokens)) for tokens in (SHORT, LONG))
    return math.log(long / short) / math.log(LONG / SHORT)


def _network(kind: str, tokens: int) -> tuple[nn.Module, torch.Tensor]:
    """A network for so many tokens, and its input."""
    if kind == "plain":
        blocks = [Block(WIDTH, HEADS, 4, eps=1e-6) for _ in range(LAYERS)]
        return nn.Sequential(*blocks), torch.randn(1, tokens, WIDTH)
    config = fit.Config(
        network="encoder",
        stages=((LAYERS // 2, LAYERS // 2), (LAYERS // 2, LAYERS // 2)),
        groups=tokens // GROUP,
        tokens=GROUP,
        latents=16,
        width=WIDTH,
        latent_width=WIDTH,
        heads=HEADS,
        latent_heads=HEADS,
    )
    return fit.build(config), torch.randn(1, config.groups, GROUP, config.channels)


def _seconds(network: nn.Module, x: torch.Tensor) -> float:
    """The time of a call: the median of some, after one that does not count."""
    taken = []
    with torch.no_grad():
        for _ in range(CALLS + 1):
            start = time.perf_counter()
            network.eval()(x)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
