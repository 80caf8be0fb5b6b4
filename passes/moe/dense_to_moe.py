"""Cut feed-forwards into a shared expert and many small ones, of which a router gives each token a few.

Source: Dense2MoE 2025 (ICCV), its layer 1S12E2A: the strongest quarter of the hidden units is shared, the rest are
dealt to 12 experts of which a token uses 2, so that 37.5 % of the feed-forward's weights are active. Its units are
scored by |dL/dw * w| summed over their weights, L being the loss of an output distillation. Departures: ``taylor``
takes random signs of the model's output for the loss, because a distillation's gradient is zero at its start. Units are
dealt in turns by rank (the paper says evenly), or, by ``grouping="clustered"``, those that answer the same tokens are
put together (``passes/moe/clusters.py``), which leaves less error at equal active units. The router has a bias and
starts from calibration inputs (``passes/moe/routers.py``).

Before the model is trained again, ``gate="one"`` is nearer to the dense layer: softmax gates of 12 experts are small.
``distill`` trains routers of both: gates of one hand the softmax's gradient on, and ``balance`` weighs what layers say
of uneven loads (``passes/moe/experts.py``, ``imbalance``; the paper weighs it 0.01).

Which form where: ``nonzero`` is exact and the fastest in ONNX Runtime; TensorRT for RTX refuses it and takes
``capacity``. Neighbouring tokens like the same experts, so that a capacity without any ``drop`` can be several times
the even load: ``computed_share`` in the facts says what is computed, ``active_share`` what is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import DENSE_FEED_FORWARDS, FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Json, Pass, Plan
from enginewright.passes.kernel.audit import without_proof
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.hidden_units import (
    finite,
    random_scores,
    refuse_without_values,
    taylor_scores,
    unknown_layers,
    weight_norms,
)
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.moe.clusters import answer_sizes, clusters_of
from enginewright.passes.moe.experts import (
    CapacityExperts,
    Form,
    Gate,
    MaskedExperts,
    MixtureOfExperts,
    NonzeroExperts,
    Products,
    expert_parts,
)
from enginewright.passes.moe.routers import Groups, Loads, balance, fit, measure_loads
from enginewright.passes.traits import FeedForward, layer_at, layers_of

HELD_OUT = 8
"""Most calls on which overflow is measured anew."""

Routers = dict[str, tuple[Tensor, Tensor]]


class DealtUnits(Decision):
    """How the hidden units of a feed-forward are dealt to experts."""

    arrays: ClassVar[Mapping[str, str]] = {
        ".router.weight": "of the router, experts by width (E, D)",
        ".router.bias": "of the router (E,)",
    }

    shared: tuple[int, ...] = Field(description="units that every token uses, rising from 0")
    experts: tuple[tuple[int, ...], ...] = Field(description="units of each expert, rising")
    of: int = Field(description="hidden units that there are")
    top_k: int = Field(description="experts that each token uses")
    gate: Gate = Field(description="what an expert's answer is multiplied by")
    capacity: int = Field(description="slots that an expert has for the tokens of a sample")


class LoadFacts(Facts):
    """How the experts of each layer are loaded."""

    calibration_calls: int = Field(description="calls")
    layers: dict[str, dict[str, Json]] = Field(
        description="by layer: shares of the units, tokens and samples, loads and overflow"
    )


class DenseToMoe(Pass):
    """Put a mixture of experts, made of its own hidden units, in the place of every feed-forward."""

    needs_calibration: ClassVar[bool] = True
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, DENSE_FEED_FORWARDS)
    destroys: ClassVar[tuple[Fact, ...]] = (DENSE_FEED_FORWARDS,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (DealtUnits,)
    facts: ClassVar[type[Facts]] = LoadFacts

    shared: float = Field(
        0.25, gt=0, lt=1, description="share of the hidden units that every token uses; takes the remainder too"
    )
    experts: int = Field(12, ge=2, le=256, description="experts that the other hidden units are dealt to")
    top_k: int = Field(2, ge=0, description="experts that each token uses; 0 leaves the shared one alone")
    importance: Literal["taylor", "weight_norm", "random"] = Field(
        "taylor", description="which units are shared: by their first-order effect on the output, weights, or chance"
    )
    grouping: Literal["turns", "clustered"] = Field(
        "turns",
        description="units that share an expert: dealt in turns by rank, or those that answer the same tokens, which "
        "leaves less error",
    )
    router: Literal["balanced", "fitted", "random"] = Field(
        "balanced", description="its start: predicts the experts' answers, with even loads or without, or random"
    )
    gate: Gate = Field(
        "softmax", description="softmax over all experts, as trained; one suits a model that is not trained again"
    )
    form: Form = Field(
        "capacity",
        description="capacity has fixed shapes; nonzero is exact and for ONNX Runtime only; masked saves no time",
    )
    products: Products = Field(
        "batched",
        description="for form=capacity: one product for all experts, or layers apart: faster on CPUs, can be quantized",
    )
    drop: float = Field(
        0.0, ge=0, lt=1, description="for form=capacity: share of choices that may find no slot on calibration inputs"
    )
    headroom: float = Field(
        1.0,
        ge=1,
        le=16,
        description="for form=capacity: slots of an expert over those that the calibration inputs need",
    )
    max_overflow: float = Field(
        1.0,
        ge=0,
        le=1,
        description="for form=capacity: end in an error where a layer drops a larger share of choices on calls that "
        "calibration did not meet (on those it met, where no other can be made)",
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of layer paths left alone")

    @field_validator("top_k")
    @classmethod
    def no_more_than_there_are(cls, top_k: int, info: ValidationInfo) -> int:
        """A token cannot use more experts than there are."""
        if top_k > info.data.get("experts", top_k):
            raise ValueError(f"there are {info.data['experts']} experts")
        return top_k

    def plan(self, model: nn.Module, context: Context) -> Plan[DealtUnits]:
        """Deal the units, start the routers, and count the loads; facts give loads and overflow of each layer.

        Raises ``ToolchainError`` for weights without values, for an ``exclude`` pattern that matches no layer and for
        more overflow than ``max_overflow``.
        """
        layers = dict(layers_of(model, FeedForward))
        skipped = unknown_layers(model, layers)
        check_patterns(self.exclude, [*layers, *skipped], what="feed-forward")
        if not layers and not skipped:
            skipped[""] = "no family knows a feed-forward in it"
        skipped |= {path: reason for path, layer in layers.items() if (reason := self.reason_to_skip(path, layer))}
        layers = {path: layer for path, layer in layers.items() if path not in skipped}
        skipped |= (disproved := without_proof(model, layers, context))
        layers = {path: layer for path, layer in layers.items() if path not in disproved}
        scores = self.scores(model, layers, context)
        clustered = self.grouping == "clustered"
        sizes = answer_sizes(model, {path: layers[path] for path in scores}, context) if clustered else {}
        units = {path: self.deal(score, sizes.get(path)) for path, score in scores.items()}
        groups = {path: Groups.of(experts, layers[path].hidden) for path, (_, experts) in units.items()}
        routers = self.routers(model, {path: layers[path] for path in scores}, groups, context)
        loads = measure_loads(model, layers, groups, routers, context, top_k=self.top_k, gate=self.gate)
        skipped |= {path: "the calibration inputs never reach it" for path in layers if path not in loads}
        layers = {path: layer for path, layer in layers.items() if path in loads}
        choice = {
            path: DealtUnits(
                shared=tuple(units[path][0]),
                experts=tuple(map(tuple, units[path][1])),
                of=layer.hidden,
                top_k=self.top_k,
                gate=self.gate,
                capacity=loads[path].capacity(drop=self.drop, headroom=self.headroom),
            )
            for path, layer in layers.items()
        }
        facts = {path: self.load_of(dealt, loads[path]) for path, dealt in choice.items()}
        notes = []
        if self.form == "capacity" and self.top_k and layers:
            later = loads
            if context.draw:
                fresh = context.draw(min(len(context.calibration), HELD_OUT), context.seed)
                other = replace(context, calibration=fresh)
                later = measure_loads(model, layers, groups, routers, other, top_k=self.top_k, gate=self.gate)
            notes.append(self.overflow_note(choice, later, fresh=later is not loads))
        arrays = {f"{path}.router.{name}": tensor for path in layers for name, tensor in by_parameter(routers[path])}
        return Plan(
            choice=choice,
            skipped=skipped,
            facts=LoadFacts(calibration_calls=len(context.calibration), layers=facts, notes=tuple(notes)),
            arrays=arrays,
        )

    def overflow_note(self, choice: dict[str, DealtUnits], loads: dict[str, Loads], *, fresh: bool) -> str:
        """The largest share of choices that a layer drops. Raises ``ToolchainError`` where it is above the limit."""
        shares = {path: loads[path].overflow(dealt.capacity) for path, dealt in choice.items()}
        worst = max(shares, key=lambda path: shares[path])
        where = "calls that calibration did not meet" if fresh else "the calibration calls, for want of others"
        note = f"at most {shares[worst]:.2%} of a layer's choices of experts find no slot on {where} ({worst})"
        if shares[worst] > self.max_overflow:
            raise ToolchainError(
                f"{note}; max_overflow is {self.max_overflow:.2%}",
                where=worst,
                help="raise headroom, lower drop, or calibrate on more calls",
            )
        return note

    def rewrite(self, model: nn.Module, plan: Plan[DealtUnits]) -> nn.Module:
        """Put the experts in, in this pass's form; all else is the plan's.

        Raises ``ToolchainError`` when a layer has not the units that the plan was made for.
        """
        for path, dealt in plan.choice.items():
            layer = layer_at(model, path, FeedForward)
            if layer.hidden != dealt.of:
                raise ToolchainError(
                    f"the plan is for a layer of {dealt.of} hidden units; this one has {layer.hidden}", where=path
                )
            router = router_of(layer, *(plan.array(f"{path}.router.{name}") for name in ("weight", "bias")))
            layer.replace_in(model, path, self.mixture(layer, dealt, router))
        return model

    def mixture(self, layer: FeedForward, dealt: DealtUnits, router: nn.Linear) -> MixtureOfExperts:
        """The layer's replacement."""
        shared, parts = layer.standalone(dealt.shared), expert_parts(layer, dealt.experts)
        if self.form == "capacity":
            slots, products = dealt.capacity, self.products
            return CapacityExperts(
                shared, parts, router, top_k=dealt.top_k, gate=dealt.gate, capacity=slots, products=products
            )
        kind = NonzeroExperts if self.form == "nonzero" else MaskedExperts
        return kind(shared, parts, router, top_k=dealt.top_k, gate=dealt.gate)

    def reason_to_skip(self, path: str, layer: FeedForward) -> str:
        """Why a feed-forward stays as it is; empty when it does not."""
        if reason := excluded_by(path, self.exclude):
            return reason
        if self.sizes(layer.hidden)[1] < 1:
            return f"has only {layer.hidden} hidden units for {self.experts} experts"
        try:
            layer.standalone([0])
        except ToolchainError as error:
            return error.message
        return ""

    def sizes(self, hidden: int) -> tuple[int, int]:
        """Hidden units of the shared expert and of each other."""
        each = int(hidden * (1 - self.shared)) // self.experts
        return hidden - each * self.experts, each

    def deal(self, scores: Tensor, sizes: Tensor | None = None) -> tuple[list[int], list[list[int]]]:
        """The strongest units for the shared expert, of equal ones the first; and those of each other.

        Args:
            scores: importance (H,).
            sizes: of the units' answers on rows (R, H), where they are clustered by them; else they go in turns.
        """
        order = scores.sort(descending=True, stable=True).indices.tolist()
        shared, _ = self.sizes(len(order))
        kept, rest = sorted(order[:shared]), order[shared:]
        if sizes is None:
            return kept, [sorted(rest[i :: self.experts]) for i in range(self.experts)]
        return kept, [sorted(rest[i] for i in own) for own in clusters_of(sizes[:, rest], self.experts)]

    def scores(self, model: nn.Module, layers: dict[str, FeedForward], context: Context) -> dict[str, Tensor]:
        """Importance (H,) of each hidden unit by layer path."""
        refuse_without_values(layers, self.importance)
        if self.importance == "taylor":
            exact = taylor_scores(model, layers, context) if layers else {}
        elif self.importance == "random":
            exact = random_scores(layers, context.seed)
        else:
            exact = {path: weight_norms(layer) for path, layer in layers.items()}
        return {path: finite(score, where=path) for path, score in exact.items()}

    def routers(
        self, model: nn.Module, layers: dict[str, FeedForward], groups: dict[str, Groups], context: Context
    ) -> Routers:
        """Weight (E, D) and bias (E,) of each layer's router."""
        if self.router == "random":
            generator = torch.Generator().manual_seed(context.seed)
            widths = {path: layer.inputs[0].in_features for path, layer in layers.items()}
            return {
                path: (
                    torch.randn(self.experts, width, generator=generator) / width**0.5,
                    torch.zeros(self.experts),
                )
                for path, width in widths.items()
            }
        routers = fit(model, layers, groups, context)
        if self.router == "balanced" and self.top_k:
            routers = balance(model, layers, routers, context, top_k=self.top_k)
        return {path: (weight.float(), bias.float()) for path, (weight, bias) in routers.items()}

    def load_of(self, dealt: DealtUnits, loads: Loads) -> dict[str, Any]:
        """Shares of the hidden units that a token uses and that are computed for it, and how the experts are loaded."""
        each = len(dealt.experts[0])
        slots = self.experts * dealt.capacity / loads.tokens if self.top_k else 0.0
        counts = loads.all()
        return {
            "active_share": rounded((len(dealt.shared) + self.top_k * each) / dealt.of),
            "computed_share": rounded((len(dealt.shared) + slots * each) / dealt.of),
            "tokens": loads.tokens,
            "samples": len(counts),
            "load": counts.sum(0).tolist(),
            "largest_load": int(counts.max()),
            "overflow": rounded(loads.overflow(dealt.capacity)),
        }


def by_parameter(router: tuple[Tensor, Tensor]) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    """A router's tensors with their names."""
    return ("weight", router[0]), ("bias", router[1])


def router_of(layer: FeedForward, weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer around copies of a router's weight (E, D) and bias (E,), of the layer's type."""
    like = layer.output.weight
    router = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    trainable = like.requires_grad
    router.weight = nn.Parameter(weight.to(like, copy=True), trainable)
    router.bias = nn.Parameter(bias.to(like, copy=True), trainable)
    return router.train(layer.output.training)


def rounded(value: float) -> float:
    """6 significant digits."""
    return six_digits(value)
