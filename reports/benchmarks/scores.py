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
from enginewright.passes.contract import Context
from enginewright.passes.quantization.quantize_weights import QuantizeWeights
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.training.transformer_programs import accuracy
from enginewright.validation.contract import ClassifyingTask
from enginewright.validation.metrics.accuracy import Accuracy

SEQUENCES, SEED = 5_000, 77
SHORT, LONG, GROUP = 1_024, 16_384, 256
"""Tokens of the shorter and of the longer input, and of a group of FIT's."""
WIDTH, HEADS, LAYERS, CALLS = 192, 3, 4, 5
ADAPTER_RANK = 16


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


def lost_of_adapter(of: str) -> float:
    """The error of 8-bit weights with an adapter in them, by the size of what the adapter adds.

    Args:
        of: the layer's width, and how large what is added is beside the weights: ``3072, 0.02``. All are random.
    """
    errors = _errors_in_eight_bits(of)
    return math.sqrt(errors["folded"] / errors["added"])


def adapters_share_of_error(of: str) -> float:
    """The share of that error's square which 8 bits of the weights without the adapter have not; ``of`` is alike."""
    errors = _errors_in_eight_bits(of)
    return 1 - errors["base"] / errors["folded"]


def _errors_in_eight_bits(of: str) -> dict[str, float]:
    """Squares of what 8 bits change of weights, as they are and with an adapter in them, and of what it adds."""
    width, strength = int(of.split(", ")[0]), float(of.split(", ")[1])
    torch.manual_seed(SEED)
    base = torch.randn(width, width)
    product = torch.randn(width, ADAPTER_RANK) @ torch.randn(ADAPTER_RANK, width)
    added = strength * product * (base.norm() / product.norm())
    squares = {"added": float(added.square().sum())}
    for name, weight in (("base", base), ("folded", base + added)):
        layer = nn.Linear(width, width, bias=False)
        layer.weight = nn.Parameter(weight)
        stored = QuantizeWeights(weights="int8").apply(nn.Sequential(layer), Context()).model
        with torch.no_grad():
            squares[name] = float((stored(torch.eye(width)).T - weight).square().sum())
    return squares
