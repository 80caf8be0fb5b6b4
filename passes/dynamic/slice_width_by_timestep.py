"""Heads and hidden units of a denoiser by timestep: few narrower networks, each for a stretch of the schedule.

Source: DyDiT (Zhao et al. 2024, arXiv:2410.03456), section 3.2, timestep-wise dynamic width, compiled: since its masks
depend on the timestep alone, they are tabled over the sampler's schedule, the schedule is cut into stretches, and for
each of these the weights are cut to what any of its timesteps needs; the exact mask of each timestep is applied inside.
Departures: no trained routers; a unit's mask comes from its importance at that timestep on calibration inputs for the
multiply-accumulates that it costs, against one bound for all timesteps and layers; ``share`` (lambda in the paper)
bounds what the cut networks compute, masked units of a stretch included; a layer keeps its most important unit, not its
first. A model that brings trained routers (DyDiT) is cut to the masks of these, and none of that is asked.

Shapes: T timesteps, U units of a layer (heads; groups of neighbouring hidden units).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import (
    ALL_INPUTS,
    FLOAT_WEIGHTS,
    INDEPENDENT_ROWS,
    ONE_NETWORK,
    UNBLENDED_ATTENTION,
    Fact,
)
from enginewright.ground.program import Table
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.dynamic.buckets import Bools, Floats, masks_for, stretches
from enginewright.passes.dynamic.masking import columns_of, mask_units
from enginewright.passes.kernel.audit import unproven
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import evaluating
from enginewright.passes.kernel.probes import Call, linear_calls, probe
from enginewright.passes.kernel.rows import repeated_rows, shared_inputs
from enginewright.passes.kernel.schedule import calls_at, even, span_of, timestep_of
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.kernel.surgery import share
from enginewright.passes.networks import local, only_network, switched
from enginewright.passes.traits import FeedForward, HeadedAttention, RoutedWidth, layer_at, layers_of, trait_of

Layer = HeadedAttention | FeedForward


class SlicedLayer(Decision):
    """The units of a layer that each stretch of timesteps needs."""

    arrays: ClassVar[Mapping[str, str]] = {".mask": "1 where a timestep needs a unit (T, U), uint8"}

    of: int = Field(description="units of the layer")
    kept: tuple[tuple[int, ...], ...] = Field(description="for each stretch the units that stay, rising from 0")


class SlicedFacts(Facts):
    """The schedule, and the stretch of each of its timesteps."""

    importance: str = Field(description="that heads and units were judged by")
    share_computed: float = Field(description="of the cost of all units at all timesteps")
    share_needed: float = Field(description="of it, by the masks of the timesteps")
    input: str = Field(description="that holds the timestep")
    timesteps: tuple[float, ...] = Field(description="of the schedule")
    table: tuple[int, ...] = Field(description="for each of them the number of its stretch")
    shared: tuple[str, ...] = Field(description="inputs that all rows of a call share")


class SliceWidthByTimestep(Pass):
    """Cut attention and feed-forwards to what a timestep needs: one network for each stretch of timesteps."""

    needs_calibration: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (
        FLOAT_WEIGHTS,
        ONE_NETWORK,
        ALL_INPUTS,
        UNBLENDED_ATTENTION,
        INDEPENDENT_ROWS,
    )
    destroys: ClassVar[tuple[Fact, ...]] = (ONE_NETWORK,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (SlicedLayer,)
    facts: ClassVar[type[Facts]] = SlicedFacts
    looks_for: ClassVar[str] = "attention layers and feed-forwards that a family knows"

    share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="multiply-accumulates of heads and hidden units left, mean over a run; no trained router is asked",
    )
    buckets: int = Field(default=3, ge=1, le=16, description="networks, each for a stretch of the schedule")
    timesteps: tuple[float, ...] = Field(
        default=(),
        description="the sampler's schedule; empty: even, from 999 to 0, or from 1 where the model counts so",
    )
    steps: int = Field(default=25, ge=1, le=1000, description="length of the even schedule")
    input: str = Field(
        default="", description="the input that holds the timestep, one for each row; empty: the one of that role"
    )
    groups: int = Field(
        default=8,
        ge=1,
        description="groups of neighbouring hidden units in each feed-forward; trained routers have their own",
    )
    importance: Literal["taylor", "activation"] = Field(
        default="taylor", description="first-order change of the output; or activation times weight, without gradients"
    )
    rows: int = Field(default=4, ge=1, description="calibration rows for each timestep: those of the nearest timesteps")
    exclude: tuple[str, ...] = Field(default=(), description="glob patterns of layer paths left alone")

    def plan(self, model: nn.Module, context: Context) -> Plan[SlicedLayer, SlicedFacts]:
        """Score every unit at every timestep, or ask trained routers; choose stretches, and what each of them keeps.

        Raises ``ToolchainError`` for an unknown input, one that is no timestep, an ``exclude`` that matches nothing.
        """
        whole, place = only_network(model)
        if isinstance(whole, RoutedWidth):
            return self.of_routers(whole, place, context)
        layers = self.layers(model)
        check_patterns(self.exclude, layers, what="attention layer or feed-forward")
        skipped = {path: reason for path, layer in layers.items() if (reason := self.reason_to_skip(path, layer))}
        layers = {path: layer for path, layer in layers.items() if path not in skipped}
        disproved = unproven(model, {path.removesuffix(":ffn") for path in layers}, context)
        skipped |= {path: disproved[own] for path in layers if (own := path.removesuffix(":ffn")) in disproved}
        layers = {path: layer for path, layer in layers.items() if path not in skipped}
        resolved = self.resolved(context) if layers else self
        scores, costs, elsewhere = resolved.scores(model, layers, context) if layers else ({}, {}, {})
        skipped |= elsewhere | {path: "the calibration inputs never reach it" for path in layers if path not in costs}
        if not scores:
            return Plan(choice={}, skipped=skipped)
        masks, table, facts = self.decide(scores, costs)
        return resolved.plan_of(masks, table, facts, skipped, context)

    def of_routers(self, routed: RoutedWidth, place: str, context: Context) -> Plan[SlicedLayer, SlicedFacts]:
        """The masks of a network's own routers, the stretches, and what each stretch keeps.

        Layers that are excluded stay as wide as they are, and silent where the routers say so.
        """
        whole, resolved = routed.whole_width(), self.resolved(context)
        with torch.no_grad(), evaluating(whole):
            found = routed.width_masks(torch.tensor(resolved.timesteps))
        masks = {path: mask.numpy() > 0 for path, mask in found.items()}
        layers = {path: self.layer(whole, path) for path in masks}
        paths = {path: f"{place}.{path}".strip(".") for path in masks}
        check_patterns(self.exclude, paths.values(), what="attention layer or feed-forward")
        linears = {path: layer.output for path, layer in layers.items()}
        with torch.no_grad(), evaluating(whole), linear_calls(linears, at="output") as seen:
            whole(**context.calibration[0])
        tokens = {call.key: call.input[0].numel() // call.input.shape[-1] for call in seen}
        widths = {path: mask.shape[1] for path, mask in masks.items()}
        costs = [cost_of_unit(layers[path], units, tokens=tokens[path]) for path, units in widths.items()]
        price = np.repeat(costs, list(widths.values()))
        needed = np.concatenate(list(masks.values()), axis=1)
        table, total = stretches(needed, price, self.buckets)
        facts = {"importance": "trained routers", **shares(needed, price, total)}
        return resolved.plan_of({paths[path]: mask for path, mask in masks.items()}, table, facts, {}, context)

    def plan_of(
        self,
        masks: Mapping[str, Any],
        table: list[int],
        told: dict[str, Any],
        skipped: dict[str, str],
        context: Context,
    ) -> Plan[SlicedLayer, SlicedFacts]:
        """What each stretch keeps of each layer, from masks (T, U) and the stretch of each timestep."""
        choice, arrays = dict[str, SlicedLayer](), dict[str, Tensor]()
        for path, mask in masks.items():
            if mask.all():
                skipped[path] = "all of it is needed at every timestep"
                continue
            stays = np.full_like(mask, bool(excluded_by(path, self.exclude))) | mask
            kept = [np.flatnonzero(stays[np.array(table) == k].any(axis=0)).tolist() for k in range(max(table) + 1)]
            choice[path] = SlicedLayer(of=mask.shape[1], kept=tuple(map(tuple, kept)))
            arrays[f"{path}.mask"] = torch.from_numpy(mask.astype(np.uint8))
        shared = shared_inputs(context, context.calibration[0], like=self.input)
        facts = SlicedFacts(
            **told, input=self.input, timesteps=self.timesteps, table=tuple(table), shared=tuple(shared)
        )
        return Plan(choice=choice, skipped=skipped, facts=facts, arrays=arrays)

    def rewrite(self, model: nn.Module, plan: Plan[SlicedLayer, SlicedFacts]) -> nn.Module:
        """One copy of the model for each stretch, cut and masked. Raises ``ToolchainError`` for another model."""
        if not plan.choice:
            return model
        times, numbers = plan.facts.timesteps, torch.tensor(plan.facts.table)
        whole, place = only_network(model)
        if isinstance(whole, RoutedWidth):
            whole = whole.whole_width()
        own_plan: Plan[SlicedLayer, SlicedFacts] = replace(
            plan, choice=local(plan.choice, place), arrays=local(plan.arrays, place)
        )
        networks = {}
        for number in range(int(numbers.max()) + 1):
            own = numbers == number
            at = [time for time, chosen in zip(times, own.tolist(), strict=True) if chosen]
            networks[str(number)] = self.narrowed(share(whole), own_plan, number, own, at)
        table = Table(input=plan.facts.input, timesteps=times, ways=plan.facts.table)
        return switched(model, networks, table, shared=plan.facts.shared)

    def narrowed(
        self, model: nn.Module, plan: Plan[SlicedLayer, SlicedFacts], number: int, own: Tensor, at: list[float]
    ) -> nn.Module:
        """Cut a model, in place, to what one stretch needs; ``own`` (T,) says which timesteps are its."""
        masks: list[tuple[str, Tensor]] = []
        for path, sliced in plan.choice.items():
            kept = sliced.kept[number]
            layer = self.layer(model, path)
            if isinstance(layer, HeadedAttention):
                units = layer.heads
                if units == sliced.of and len(kept) < units:
                    layer.keep_heads(kept)
            else:
                units, width = sliced.of, layer.hidden // sliced.of
                if len(kept) < units:
                    layer.keep_hidden([unit * width + i for unit in kept for i in range(width)])
            if units != sliced.of:
                raise ToolchainError(f"the plan is for a layer of {sliced.of} heads; this one has {units}", where=path)
            masks.append((path, plan.array(f"{path}.mask")[own][:, list(kept)]))
        layers = [(self.layer(model, path), mask) for path, mask in masks]
        return mask_units(model, layers, plan.facts.input, at)

    def layers(self, model: nn.Module) -> dict[str, Layer]:
        """Attention layers and feed-forwards by path, in the model's order.

        Where one module is both (a parallel block), the feed-forward's path ends in ``:ffn``.
        """
        found: dict[str, Layer] = dict(layers_of(model, HeadedAttention))
        own = {f"{path}:ffn" if path in found else path: layer for path, layer in layers_of(model, FeedForward)}
        return found | own

    def layer(self, model: nn.Module, path: str) -> Layer:
        """The layer at a path."""
        if path.endswith(":ffn"):
            return layer_at(model, path.removesuffix(":ffn"), FeedForward)
        return trait_of(model.get_submodule(path), HeadedAttention) or layer_at(model, path, FeedForward)

    def reason_to_skip(self, path: str, layer: Layer) -> str:
        """Why a layer is left alone, if it is."""
        if reason := excluded_by(path, self.exclude):
            return reason
        if isinstance(layer, FeedForward) and layer.hidden % self.groups:
            return f"its {layer.hidden} hidden units do not fall into {self.groups} groups"
        return ""

    def units(self, layer: Layer) -> int:
        """How many units a layer has."""
        return layer.heads if isinstance(layer, HeadedAttention) else self.groups

    def resolved(self, context: Context) -> SliceWidthByTimestep:
        """The same with the input that holds the timestep, and with the timesteps."""
        input = timestep_of(self.input, context, context.calibration[0])
        times = self.timesteps or even(self.steps, span_of(context, input)[1])
        return self.model_copy(update={"input": input, "timesteps": times})

    def scores(
        self, model: nn.Module, layers: Mapping[str, Layer], context: Context
    ) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str]]:
        """By layer that ran: importance (T, U) of its units, and what one of them costs; and why some cannot be cut."""
        linears = {path: layer.output for path, layer in layers.items()}
        found: dict[str, list[Tensor]] = {path: [] for path in layers}
        rows: dict[str, int] = {}
        costs: dict[str, float] = {}
        calls = calls_at(context, self.timesteps, input=self.input, rows=self.rows)
        for done, call in enumerate(calls, start=1):
            totals: dict[str, Tensor] = {}
            use = partial(self.add, layers, totals, costs, rows)
            if self.importance == "taylor":
                probe(model, linears, replace(context, calibration=[call], say=silent), use, at="input", what="units")
            else:
                with torch.no_grad(), evaluating(model), linear_calls(linears, at="output") as seen:
                    model(**call)
                use(seen, [entry.input for entry in seen])
            for path, total in totals.items():
                found[path].append(total)
            context.say(done, len(calls), "scoring heads and hidden units")
        own = len(calls[0][self.input].reshape(-1)) * repeated_rows(model)
        elsewhere = {
            path: f"it runs on {count} rows where a call has {own}, and each row of a call has its own timestep"
            for path, count in rows.items()
            if count != own
        }
        scores = {path: torch.stack(each) for path, each in found.items() if each and path not in elsewhere}
        return scores, costs, elsewhere

    def add(
        self,
        layers: Mapping[str, Layer],
        totals: dict[str, Tensor],
        costs: dict[str, float],
        rows: dict[str, int],
        calls: list[Call],
        gradients: list[Tensor],
    ) -> None:
        """Add what one run says about the units of each layer (U,); without gradients these are the inputs again."""
        for call, gradient in zip(calls, gradients, strict=True):
            path, layer = call.key, layers[call.key]
            units = self.units(layer)
            first, width = columns_of(layer)
            own = slice(first, first + width)
            parts = [x.detach()[..., own].double().unflatten(-1, (units, -1)) for x in (call.input, gradient)]
            products = (parts[0] * parts[1]).sum(dim=-1).reshape(len(call.input), -1, units).sum(dim=1)  # (B, U)
            if self.importance == "taylor":
                score = products.abs().sum(dim=0)
            else:
                weights = layer.output.weight.detach()[:, own].double().unflatten(1, (units, -1))
                score = products.sum(dim=0).sqrt() * torch.linalg.vector_norm(weights, dim=(0, 2))
            totals[path] = totals[path] + score if path in totals else score
            rows[path] = len(call.input)
            costs[path] = cost_of_unit(layer, units, tokens=call.input[0].numel() // call.input.shape[-1])

    def decide(
        self, scores: Mapping[str, Tensor], costs: Mapping[str, float]
    ) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
        """Masks (T, U) by layer, the stretch of each timestep, and what they amount to."""
        widths = [score.shape[1] for score in scores.values()]
        price = np.repeat([costs[path] for path in scores], widths)
        worth = np.concatenate([score.numpy() for score in scores.values()], axis=1) / price
        if not np.isfinite(worth).all():
            raise ToolchainError("the importance of heads or hidden units is not finite")
        worth = np.array([[six_digits(value) for value in row] for row in worth])
        layers = np.repeat(np.arange(len(scores)), widths)
        masks = masks_for(worth, price, layers, self.buckets, self.share)
        table, total = stretches(masks, price, self.buckets)
        facts = {"importance": self.importance, **shares(masks, price, total)}
        split = np.split(masks, np.cumsum(widths)[:-1], axis=1)
        return dict(zip(scores, split, strict=True)), table, facts


def shares(masks: Bools, price: Floats, computed: float) -> dict[str, float]:
    """Of the cost of all units (U,) at all timesteps: what is computed, and what the masks (T, U) need."""
    everything = len(masks) * price.sum()
    return {
        "share_computed": six_digits(computed / everything),
        "share_needed": six_digits((masks @ price).sum() / everything),
    }


def silent(done: int, total: int, text: str) -> None:
    """Say nothing."""


def cost_of_unit(layer: Layer, units: int, *, tokens: int) -> float:
    """Multiply-accumulates of one unit for one row: its share of the projections, and of the attention itself.

    Of an attention layer four projections of the output's size are counted, and as many keys as queries.
    """
    if isinstance(layer, HeadedAttention):
        own = layer.output.weight.shape[0] * layer.heads * layer.head_dim
        return tokens * (4 * own / units + 2 * tokens * layer.head_dim)
    weights = sum(linear.weight.numel() for linear in layer.inputs)
    read = layer.output.weight.shape[0] * layer.hidden
    return tokens * (weights + read) / units
