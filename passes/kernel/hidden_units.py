"""How much each hidden unit of a feed-forward matters.

Shapes: D width of the layer, H hidden units, R rows (all leading dimensions together).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import observe, reading
from enginewright.passes.kernel.probes import Call, probe
from enginewright.passes.kernel.selection import refuse_meta, without_layout
from enginewright.passes.kernel.statistics import Squares
from enginewright.passes.traits import FeedForward

Layers = Mapping[str, FeedForward]

NAMES = ("mlp", "feedforward", "ffn")
"""What classes of feed-forwards are called."""


def weight_norms(layer: FeedForward) -> Tensor:
    """Product of the L2 norms of a unit's rows in the input projections and of its output column, (H,)."""
    score = torch.linalg.vector_norm(columns(layer), dim=0, dtype=torch.float64)
    for linear in layer.inputs:
        norms = torch.linalg.vector_norm(linear.weight.detach(), dim=1, dtype=torch.float64)  # (stacks*H,)
        score = score * norms.unflatten(0, (layer.stacks, layer.hidden)).prod(dim=0)
    return score


def columns(layer: FeedForward) -> Tensor:
    """The output projection's columns that read hidden units, (D, H)."""
    return layer.output.weight.detach()[:, layer.first_column :]


def random_scores(layers: Layers, seed: int) -> dict[str, Tensor]:
    """Uniform in [0, 1), (H,) for each layer."""
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.rand(layer.hidden, generator=generator, dtype=torch.float64) for path, layer in layers.items()}


def activation_scores(model: nn.Module, layers: Layers, context: Context) -> dict[str, Tensor]:
    """L2 norm of a unit's activation over all rows, times the L1 norm of its output column; for layers that ran.

    Wanda (Sun et al. 2023, arXiv:2306.11695, equation 1) scores the weight from unit j to output i by
    |W_ij| * ||X_j||; a unit gets the sum over i.
    """
    squares = {path: Squares() for path in layers}
    looks = [
        reading(layer.output, squares[path], columns=slice(layer.first_column, None)) for path, layer in layers.items()
    ]
    observe(model, looks, context, doing="scoring hidden units")
    return {
        path: total.sqrt() * columns(layer).abs().sum(dim=0, dtype=torch.float64)
        for path, layer in layers.items()
        if (total := squares[path].total) is not None
    }


def taylor_scores(model: nn.Module, layers: Layers, context: Context) -> dict[str, Tensor]:
    """First-order change |gradient * weight|, summed over a unit's rows, biases and column, batches and probes; (H,).

    Molchanov et al. 2019, arXiv:1906.10771, equation 8, with each weight's size in the place of its square. The
    gradient of a weight is made from those at the projections' outputs, one layer at a time, and not kept.
    """
    linears = {
        (path, number): linear
        for path, layer in layers.items()
        for number, linear in enumerate((layer.output, *layer.inputs))
    }
    totals: dict[str, Tensor] = {}
    probe(model, linears, context, partial(add_changes, layers, linears, totals), at="output", what="hidden units")
    return {path: totals[path] for path in layers if path in totals}


def add_changes(
    layers: Layers,
    linears: Mapping[tuple[str, int], nn.Linear],
    totals: dict[str, Tensor],
    calls: Sequence[Call],
    gradients: Sequence[Tensor],
) -> None:
    """Add one probe's changes to the totals of the layers that ran."""
    by_linear: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for call, gradient in zip(calls, gradients, strict=True):
        by_linear.setdefault(call.key, []).append((call.input.detach(), gradient))
    for (path, number), pairs in by_linear.items():
        layer, linear = layers[path], linears[path, number]
        change = weight_change(linear, pairs)  # (out, in)
        if number == 0:
            score = change[:, layer.first_column :].sum(dim=0, dtype=torch.float64)
        else:
            rows = change.sum(dim=1, dtype=torch.float64) + bias_change(linear, pairs)
            score = rows.unflatten(0, (layer.stacks, layer.hidden)).sum(dim=0)
        totals[path] = totals[path] + score if path in totals else score


def weight_change(linear: nn.Linear, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """|gradient * weight| (out, in), from inputs and gradients at the output of every call."""
    x, gradient = (torch.cat([pair[side].flatten(0, -2) for pair in pairs]) for side in (0, 1))  # (R, in), (R, out)
    return (gradient.T @ x * linear.weight.detach()).abs()


def bias_change(linear: nn.Linear, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | float:
    """|gradient * bias| (out,); 0 without a bias."""
    if linear.bias is None:
        return 0.0
    gradient = torch.stack([g.flatten(0, -2).sum(dim=0, dtype=torch.float64) for _, g in pairs]).sum(dim=0)
    return (gradient * linear.bias.detach()).abs()


def unknown_layers(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Layers that are called feed-forwards and that no family knows, unless they lie around or within one that is."""
    return without_layout(model, layers, NAMES, "hidden units")


def refuse_without_values(layers: Layers, importance: str) -> None:
    """Raise when weights have no values to judge by."""
    refuse_meta({path: [each.weight for each in (x.output, *x.inputs)] for path, x in layers.items()}, importance)


def finite(score: Tensor, *, where: str) -> Tensor:
    """Scores (H,) to 6 significant digits, so that the last bits of another machine decide nothing."""
    if not score.isfinite().all():
        raise ToolchainError(f"the importance of {int((~score.isfinite()).sum())} units is not finite", where=where)
    return torch.tensor([six_digits(value) for value in score.tolist()], dtype=torch.float64)
