"""Remove the hidden units of feed-forwards that matter least.

Sources, by importance: ``weight_norm`` the product of the norms of what a unit reads and writes (data-free);
``taylor`` Molchanov et al. 2019, arXiv:1906.10771, section 3.1; ``activation`` Wanda, Sun et al. 2023,
arXiv:2306.11695, equation 1, summed over a unit's outputs; ``random`` the baseline that each of them has to beat.
Departures: ``taylor`` has no labels and takes sums of the model's first output under random signs for the loss;
with ``scope = "global"`` each layer's scores are divided by their L2 norm, as Molchanov et al. 2017,
arXiv:1611.06440, section 2.2 do.

The residual width of a model stays: norms, embeddings, position tables and heads read it as well as every block does,
and the traits do not tell of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, FREE_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.audit import without_proof
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.hidden_units import (
    activation_scores,
    finite,
    random_scores,
    refuse_without_values,
    taylor_scores,
    unknown_layers,
    weight_norms,
)
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.traits import FeedForward, layer_at, layers_of

Layers = Mapping[str, FeedForward]

WITH_DATA = ("taylor", "activation")


class RemovedUnits(Decision):
    """The hidden units that a feed-forward loses."""

    removed: tuple[int, ...] = Field(description="units that go, rising from 0")
    of: int = Field(description="hidden units that it has")


class WidthFacts(Facts):
    """What hidden units were judged by."""

    importance: str = Field(description="that was asked for")
    scope: str = Field(description="in which units compete")
    scores: dict[str, dict[str, float]] = Field(description="by layer, of its units")
    units: dict[str, int] = Field(description="how many there are, and how many go")
    calibration_batches: int = Field(0, description="calls, where the importance needs some")


class PruneWidth(Pass):
    """Remove the weakest hidden units of every feed-forward; the model's own width stays."""

    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, FREE_WEIGHTS)
    looks_for: ClassVar[str] = "feed-forwards that a family knows"
    decisions: ClassVar[tuple[type[Decision], ...]] = (RemovedUnits,)
    facts: ClassVar[type[Facts]] = WidthFacts

    share: float = Field(0.25, ge=0, lt=1, description="fraction of hidden units removed")
    scope: Literal["layer", "global"] = Field(
        "layer", description="layer takes the share from each; global from all together, the weakest first"
    )
    floor: float = Field(0.25, ge=0, le=1, description="fraction of its units that each layer keeps, for scope=global")
    round_to: int = Field(8, ge=1, description="the number of units left in a layer is a multiple of this")
    importance: Literal["weight_norm", "taylor", "activation", "random"] = Field(
        "weight_norm", description="how units are judged; taylor and activation need calibration inputs"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of feed-forward paths left alone")

    def plan(self, model: nn.Module, context: Context) -> Plan[RemovedUnits]:
        """Score the units of each layer and choose those that go, in ascending order.

        Raises ``ToolchainError`` for weights without values, for an importance that needs calibration inputs and gets
        none, and for an ``exclude`` pattern that matches no feed-forward.
        """
        if self.importance in WITH_DATA:
            asked = f"importance {self.importance!r}"
            self.check_calibration(context, asked, otherwise="take importance = 'weight_norm'")
        layers = dict(layers_of(model, FeedForward))
        skipped = unknown_layers(model, layers)
        check_patterns(self.exclude, [*layers, *skipped], what="feed-forward")
        skipped |= {path: reason for path in layers if (reason := self.reason_to_skip(path, layers[path]))}
        layers = {path: layer for path, layer in layers.items() if path not in skipped}
        skipped |= (disproved := without_proof(model, layers, context))
        layers = {path: layer for path, layer in layers.items() if path not in disproved}
        scores = self.scores(model, layers, context)
        skipped |= {path: "the calibration inputs never reach it" for path in layers if path not in scores}
        numbers = self.numbers_kept(scores)
        choice: dict[str, RemovedUnits] = {}
        judged = {}
        for path, score in scores.items():
            if numbers[path] == len(score):
                skipped[path] = f"its units are all stronger than those that a share of {self.share} takes elsewhere"
            else:
                choice[path], judged[path] = choose(score, numbers[path])
        units = {
            "of": sum(map(len, scores.values())),
            "removed": sum(len(units.removed) for units in choice.values()),
        }
        facts = WidthFacts(importance=self.importance, scope=self.scope, scores=judged, units=units)
        if self.importance in WITH_DATA:
            facts = facts.model_copy(update={"calibration_batches": len(context.calibration)})
        return Plan(choice=choice, skipped=skipped, facts=facts)

    def rewrite(self, model: nn.Module, plan: Plan[RemovedUnits]) -> nn.Module:
        """Cut, in place. Raises ``ToolchainError`` when a layer has not the units that the plan was made for."""
        for path, units in plan.choice.items():
            layer = layer_at(model, path, FeedForward)
            if layer.hidden != units.of:
                raise ToolchainError(
                    f"the plan is for a layer of {units.of} hidden units; this one has {layer.hidden}", where=path
                )
            gone = set(units.removed)
            layer.keep_hidden([unit for unit in range(layer.hidden) if unit not in gone])
        return model

    def rounded(self, kept: float, of: int) -> int:
        """The multiple nearest to a number of units to keep, halves down; at least one multiple, at most all."""
        return min(max(math.ceil(kept / self.round_to - 0.5), 1) * self.round_to, of)

    def reason_to_skip(self, path: str, layer: FeedForward) -> str | None:
        """Why a layer that can be cut is left alone, if it is."""
        if reason := excluded_by(path, self.exclude):
            return reason
        if layer.hidden <= self.round_to:
            return f"has {layer.hidden} hidden units, no more than the smallest number, {self.round_to}"
        if self.share == 0 or (
            self.scope == "layer" and self.rounded((1 - self.share) * layer.hidden, layer.hidden) == layer.hidden
        ):
            return f"a share of {self.share} of its {layer.hidden} units rounds to none"
        return None

    def scores(self, model: nn.Module, layers: Layers, context: Context) -> dict[str, Tensor]:
        """Importance (H,) of each unit by layer path, to 6 significant digits; no entry for a layer that never ran."""
        if self.importance == "random":
            return random_scores(layers, context.seed)
        refuse_without_values(layers, self.importance)
        if self.importance == "taylor":
            exact = taylor_scores(model, layers, context) if layers else {}
        elif self.importance == "activation":
            exact = activation_scores(model, layers, context) if layers else {}
        else:
            exact = {path: weight_norms(layer) for path, layer in layers.items()}
        return {path: finite(score, where=path) for path, score in exact.items()}

    def numbers_kept(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """How many units each layer keeps."""
        if self.scope == "layer":
            return {path: self.rounded((1 - self.share) * len(score), len(score)) for path, score in scores.items()}
        rivals = {path: rivalling(score, self.floor) for path, score in scores.items()}
        ranked = sorted((value, place, path) for place, path in enumerate(rivals) for value in rivals[path])
        losers = [path for _, _, path in ranked[: math.floor(self.share * sum(map(len, scores.values())) + 0.5)]]
        return {path: self.rounded(len(score) - losers.count(path), len(score)) for path, score in scores.items()}


def rivalling(score: Tensor, floor: float) -> list[float]:
    """The scores (H,) over their L2 norm, without those of the strongest units that stay in any case."""
    norm = float(score.norm())
    values = sorted(six_digits(value) for value in (score / norm if norm else score).tolist())
    return values[: len(values) - math.ceil(floor * len(values))]


def choose(score: Tensor, number_kept: int) -> tuple[RemovedUnits, dict[str, float]]:
    """Which units go (the lowest scores; of equal ones, the first), ascending; and between which scores the cut is."""
    values = score.tolist()
    ranked = sorted(range(len(values)), key=lambda unit: (values[unit], unit))
    gone = ranked[: len(values) - number_kept]
    limits = {"strongest_removed": values[gone[-1]], "weakest_kept": values[ranked[len(gone)]]}
    return RemovedUnits(removed=tuple(sorted(gone)), of=len(values)), limits
