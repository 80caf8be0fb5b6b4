"""How much each hidden unit of a feed-forward matters.

Shapes: B samples, D width, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from passes.contract import Context
from passes.pruning.prune_heads import PROBES, evaluating, first_floating, results_of
from passes.traits import FeedForward
from toolchain.errors import ToolchainError

Layers = Mapping[str, FeedForward]


def weight_norms(layer: FeedForward) -> Tensor:
    """L2 norm (H,) of all weights of a unit: its rows of the input projections and its column of the output's."""
    squares = layer.output.weight.detach()[:, layer.first_column :].double().square().sum(0)
    for linear in layer.inputs:
        rows = linear.weight.detach().double().square().sum(1)
        if linear.bias is not None:
            rows = rows + linear.bias.detach().double().square()
        squares = squares + rows.view(layer.stacks, layer.hidden).sum(0)
    return squares.sqrt()


def random_scores(layers: Layers, seed: int) -> dict[str, Tensor]:
    """A number (H,) by chance for each unit."""
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.rand(layer.hidden, generator=generator) for path, layer in layers.items()}


def taylor_scores(model: nn.Module, layers: Layers, context: Context) -> dict[str, Tensor]:
    """|<unit, gradient>| (H,) of each layer that ran, over all examples; the loss is the output under random signs."""
    totals: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(context.seed)
    with torch.enable_grad(), evaluating(model):
        for done, inputs in enumerate(context.calibration, start=1):
            with results_of(cast(Any, layers)) as results:
                output = first_floating(model(**inputs))
            if results and not output.requires_grad:
                raise ToolchainError(
                    "taylor cannot trace the model's output back to its feed-forwards: its forward cuts gradients"
                )
            for _ in range(PROBES if results else 0):
                signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
                tensors = [units for _, units in results]
                gradients = torch.autograd.grad(
                    (output * signs).sum(), tensors, retain_graph=True, materialize_grads=True
                )
                for (path, units), gradient in zip(results, gradients, strict=True):
                    products = (units.detach().double() * gradient.double()).reshape(len(units), -1, units.shape[-1])
                    score = products.sum(1).abs().sum(0)[layers[path].first_column :]
                    totals[path] = totals[path] + score if path in totals else score
            context.say(done, len(context.calibration), "scoring hidden units")
    return {path: significant(totals[path], where=path) for path in layers if path in totals}


def significant(scores: Tensor, *, where: str) -> Tensor:
    """Scores (H,) to 6 significant digits, so that the last bits of another machine decide nothing."""
    if not scores.isfinite().all():
        raise ToolchainError("the importance of its hidden units is not finite", where=where)
    return torch.tensor([float(f"{score:.6g}") for score in scores.tolist()], dtype=torch.float64)
