"""Remove the attention heads that matter least, the same share in every layer or the weakest of all.

Source: Michel et al. 2019, arXiv:1905.10650, section 4.1 and equation 2: a head's importance is the expected size of
the loss's first-order change when the head is gated off. Departures: ``weight_norm`` scores a head by its columns of
the output projection, so that no data is needed; ``taylor`` has no labels and takes sums of the model's first output
under random signs for the loss, whose squared gradient is on average the output's own squared change (a mean square
of the output would be blind where a layer norm comes last, which fixes it). With ``scope = "global"`` scores
are divided by the L2 norm of their layer first, as the paper does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.audit import without_proof
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.heads import Heads, KeptHeads, held_in_state, keep_heads, uncut
from enginewright.passes.kernel.probes import Call, probe
from enginewright.passes.kernel.selection import check_patterns, excluded_by, refuse_meta
from enginewright.passes.traits import HeadedAttention, layers_of

Scores = dict[str, list[float]]


class HeadFacts(Facts):
    """What heads were judged by."""

    importance: str = Field(description="that was asked for")
    scores: dict[str, list[float]] = Field(description="by layer, of its heads")
    calibration_batches: int = Field(0, description="calls, where the importance needs some")


class PruneHeads(Pass):
    """Remove the weakest heads of every attention layer; the model's own width stays."""

    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    looks_for: ClassVar[str] = "attention layers whose heads can be told apart"
    decisions: ClassVar[tuple[type[Decision], ...]] = (KeptHeads,)
    facts: ClassVar[type[Facts]] = HeadFacts

    share: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description="fraction of heads removed in each layer, rounded to whole heads; one always stays",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="layer takes the share from each; global from all together, the weakest first"
    )
    importance: Literal["weight_norm", "taylor"] = Field(
        default="weight_norm",
        description="weight_norm reads the output projection alone; taylor also needs calibration inputs",
    )
    exclude: tuple[str, ...] = Field(default=(), description="glob patterns of layer paths left alone")

    def plan(self, model: nn.Module, context: Context) -> Plan[KeptHeads]:
        """Score the heads of each layer and choose those that stay, in ascending order.

        Raises ``ToolchainError`` for weights without values, for ``taylor`` without calibration inputs, and for an
        ``exclude`` pattern that matches no attention layer.
        """
        if self.importance == "taylor":
            self.check_calibration(context, "importance 'taylor'", otherwise="take importance = 'weight_norm'")
        layers = dict(layers_of(model, HeadedAttention))
        skipped = uncut(model, layers)
        check_patterns(self.exclude, [*layers, *skipped], what="attention layer")
        skipped |= held_in_state(model, layers)
        skipped |= {path: reason for path, layer in layers.items() if (reason := self.reason_to_skip(path, layer))}
        layers = {path: layer for path, layer in layers.items() if path not in skipped}
        skipped |= (disproved := without_proof(model, layers, context))
        layers = {path: layer for path, layer in layers.items() if path not in disproved}
        scores = self.scores(model, layers, context)
        skipped |= {path: "the calibration inputs never reach it" for path in layers if path not in scores}
        numbers = self.numbers_removed(scores)
        choice = {path: choose(score, numbers[path]) for path, score in scores.items() if numbers[path]}
        stronger = f"its heads are all stronger than those that a share of {self.share} takes elsewhere"
        skipped |= {path: stronger for path in scores if path not in choice}
        facts = HeadFacts(importance=self.importance, scores=scores)
        if self.importance == "taylor":
            facts = facts.model_copy(update={"calibration_batches": len(context.calibration)})
        return Plan(choice=choice, skipped=skipped, facts=facts)

    def rewrite(self, model: nn.Module, plan: Plan[KeptHeads]) -> nn.Module:
        """Cut, in place. Raises ``ToolchainError`` when a layer has not the heads that the plan was made for."""
        return keep_heads(model, plan.choice)

    def number_removed(self, heads: int) -> int:
        """Heads to remove of so many: the nearest whole number, halves up, and never all."""
        return min(math.floor(self.share * heads + 0.5), heads - 1)

    def numbers_removed(self, scores: Scores) -> dict[str, int]:
        """Heads to remove of each layer, whose strongest always stays."""
        if self.scope == "layer":
            return {path: self.number_removed(len(score)) for path, score in scores.items()}
        rivals: list[tuple[float, int, str]] = []
        for place, (path, score) in enumerate(scores.items()):
            norm = math.hypot(*score) or 1.0
            rivals += [(six_digits(value / norm), place, path) for value in sorted(score)[:-1]]
        total = math.floor(self.share * sum(map(len, scores.values())) + 0.5)
        losers = [path for _, _, path in sorted(rivals)[:total]]
        return {path: losers.count(path) for path in scores}

    def reason_to_skip(self, path: str, layer: HeadedAttention) -> str | None:
        """Why a layer that can be cut is left alone, if it is."""
        if reason := excluded_by(path, self.exclude):
            return reason
        if layer.heads == 1:
            return "has one head only"
        if self.share == 0 or (self.scope == "layer" and self.number_removed(layer.heads) == 0):
            return f"a share of {self.share} of its {layer.heads} heads rounds to none"
        return None

    def scores(self, model: nn.Module, layers: Heads, context: Context) -> Scores:
        """Importance of each head by layer path, to 6 significant digits; no entry for a layer that never ran."""
        refuse_meta({path: [x.weight for x in layer.outputs] for path, layer in layers.items()}, self.importance)
        if self.importance == "taylor":
            exact = taylor_scores(model, layers, context) if layers else {}
        else:
            exact = {path: weight_norms(layer) for path, layer in layers.items()}
        return {path: finite(score, where=path) for path, score in exact.items()}


def choose(scores: Sequence[float], number_removed: int) -> KeptHeads:
    """Which heads go (the lowest scores; of equal ones, the first) and which stay, both in ascending order."""
    ranked = sorted(range(len(scores)), key=lambda head: (scores[head], head))
    kept, removed = sorted(ranked[number_removed:]), sorted(ranked[:number_removed])
    return KeptHeads(kept=tuple(kept), removed=tuple(removed), of=len(scores))


def finite(scores: Tensor, *, where: str) -> list[float]:
    """Scores (H,) as numbers of 6 significant digits, so that the last bits of another machine decide nothing."""
    if not scores.isfinite().all():
        raise ToolchainError(f"the importance of its heads is not finite: {scores.tolist()}", where=where)
    return [six_digits(score) for score in scores.tolist()]


def weight_norms(layer: HeadedAttention) -> Tensor:
    """L2 norm (H,) of each head's columns of the output projections, each (D, H*head_dim and more)."""
    heads, head_dim = layer.heads, layer.head_dim
    weights = torch.cat([output.weight.detach()[:, : heads * head_dim].double() for output in layer.outputs])
    return torch.linalg.vector_norm(weights.unflatten(1, (heads, head_dim)), dim=(0, 2))


def taylor_scores(model: nn.Module, layers: Heads, context: Context) -> dict[str, Tensor]:
    """Equation 2 of Michel et al., (H,) for each layer that ran: |<result, gradient>| over all examples and probes."""
    totals: dict[str, Tensor] = {}
    readers = {(path, i): output for path, layer in layers.items() for i, output in enumerate(layer.outputs)}

    def use(calls: Sequence[Call], gradients: Sequence[Tensor]) -> None:
        for path, score in gate_scores(layers, calls, gradients):
            totals[path] = totals[path] + score if path in totals else score

    probe(model, readers, context, use, at="input", what="heads")
    return {path: totals[path] for path in layers if path in totals}


def gate_scores(layers: Heads, calls: Sequence[Call], gradients: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """For each layer: its path, and (H,) sums over examples of |<result, gradient>|.

    A result is what an output projection reads, (B, ..., H*head_dim and more). Where a layer has several (of image and
    of text), one gate would close a head in all of them, so their products are added before the absolute value.
    """
    products: dict[str, Tensor] = {}
    for call, gradient in zip(calls, gradients, strict=True):
        (path, _), result = call.key, call.input
        heads, head_dim = layers[path].heads, layers[path].head_dim
        product = (result.detach().double() * gradient.double())[..., : heads * head_dim]
        product = product.reshape(len(result), -1, heads, head_dim).sum(dim=(1, 3))  # (B, H)
        products[path] = products[path] + product if path in products else product
    for path, product in products.items():
        yield path, product.abs().sum(dim=0)
