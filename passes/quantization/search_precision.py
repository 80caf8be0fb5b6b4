"""Choose each layer's precision: measure what every layer's loses alone, then spend a budget where it costs least.

Sources: Dong et al. 2019, arXiv:1911.03852 (HAWQ-V2: sensitivities add up, an exact choice under a budget); here a
sensitivity is the measured error of the model's outputs with that one layer changed, not a trace of the Hessian, and
the choice is solved exactly (``budget.py``). Errors of single layers are taken to be independent, so that their squares
add up; the chosen mix is measured as a whole as well, and so is each candidate used everywhere, and the best that was
measured within the budget is taken. What only holds together (a norm that is divided and the layers whose weights are
multiplied for it) is chosen together, as one unit.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import (
    Context,
    Curve,
    Decision,
    Declared,
    Facts,
    Inputs,
    Json,
    Pass,
    Plan,
    as_json,
    cost,
    macs_by_module,
)
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.distance import relative_l2
from enginewright.passes.kernel.rounding import weight_scales
from enginewright.passes.kernel.scales import as_bytes
from enginewright.passes.kernel.surgery import share
from enginewright.passes.quantization.budget import Option, Trade, at_most, best_trades, within
from enginewright.passes.quantization.convert_dtype import ConvertedFacts
from enginewright.passes.quantization.grouping import DividedNorm, QuantizedLayer
from enginewright.passes.quantization.linear import QuantizedLinear
from enginewright.passes.quantization.quantize_int8 import Int8Layer
from enginewright.passes.quantization.smoothing import multiplied

ROUNDS = 6
"""How often a bound on the error is tightened when the measured mix misses it."""


class PickedDecision(Decision):
    """The candidate that a layer is given to, and what that decided."""

    model_config = ConfigDict(populate_by_name=True)

    candidate: int = Field(description="its place among the candidates, from 0")
    pass_name: str = Field(alias="pass", description="the pass that it is")
    decision: Decision = Field(description="that pass's own")

    def array_names(self, path: str) -> set[str]:
        """Those of the candidate's decision, after its number: several candidates may name arrays alike."""
        return {f"{self.candidate}/{name}" for name in self.decision.array_names(path)}

    def as_json(self) -> dict[str, Json]:
        """The fields, and beside them once more those of the decision, among which targets look for theirs."""
        own = self.decision.as_json()
        return {**own, "candidate": self.candidate, "pass": self.pass_name, "decision": own}


@dataclass(frozen=True, kw_only=True)
class DeclaredMix(Declared):
    """What a mix of passes says of its decisions: each is what its own pass declares."""

    candidates: tuple[Declared, ...]

    def decision(self, path: str, found: Json) -> Decision:
        """One decision, and the candidate's own within it."""
        if isinstance(found, PickedDecision):
            return found
        fields = as_json(found)
        inner = fields.get("decision") if isinstance(fields, Mapping) else None
        if isinstance(inner, Mapping):
            own = {name: value for name, value in fields.items() if name not in inner or inner[name] != value}
            fields = {**own, "decision": {}}
        picked = super().decision(path, fields)
        assert isinstance(picked, PickedDecision)
        names = [each.name for each in self.candidates]
        if picked.pass_name not in names[picked.candidate : picked.candidate + 1]:
            raise ToolchainError(
                f"a decision of {self.name} is of candidate {picked.candidate}, {picked.pass_name!r}; the candidates "
                f"are {', '.join(names)}",
                where=f"choice.{path}.candidate",
            )
        decided = self.candidates[picked.candidate].decision(f"{path}.decision", inner)
        return picked.model_copy(update={"decision": decided})


class PrecisionFacts(Facts):
    """What a search of precisions found."""

    sensitivity: dict[str, list[float]] = Field(
        description="by layer, of each candidate: the relative L2 error of the model with that layer alone changed"
    )
    error: float = Field(description="predicted for the choice")
    error_in_pytorch: float = Field(description="measured for the choice")
    cost_share: float = Field(description="of the choice, of what the layers were")
    uniform: list[dict[str, Json]] = Field(
        description="each candidate everywhere: its pass, its share of the cost, its error"
    )


class SearchPrecision(Pass):
    """Mix precisions layer by layer: least error within a budget, or least cost within an error."""

    needs_calibration: ClassVar[bool] = True
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    destroys: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    looks_for: ClassVar[str] = "linear layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (PickedDecision,)
    facts: ClassVar[type[Facts]] = PrecisionFacts

    candidates: tuple[dict[str, Any], ...] = Field(
        ({"pass": "quantize_int8"},),
        min_length=1,
        description="quantization passes to choose from, each a table with 'pass' and its parameters",
    )
    cost: Literal["bytes", "macs"] = Field(
        "bytes", description="bytes of the weights; or multiply-accumulates of one call times the bytes of a weight"
    )
    budget: float | None = Field(
        None, gt=0, le=1, description="cost of the layers, as a share of what it is now; None: as max_error says"
    )
    max_error: float = Field(
        0.02, gt=0, description="without a budget: largest relative L2 error of the outputs on the calibration inputs"
    )
    calls: int = Field(4, ge=1, description="calibration calls that sensitivities are measured on")

    @field_validator("candidates")
    @classmethod
    def known(cls, tables: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """Refuse what is no quantization pass; its parameters are checked too."""
        for table in tables:
            made(table)
        return tables

    @property
    def declared(self) -> DeclaredMix:
        """Its own, and what the candidates declare; the version grows with any of theirs."""
        own, candidates = super().declared, tuple(made(table).declared for table in self.candidates)
        version = own.version + sum(each.version - 1 for each in candidates)
        return DeclaredMix(name=own.name, kinds=own.kinds, version=version, facts=own.facts, candidates=candidates)

    def plan(self, model: nn.Module, context: Context) -> Plan[PickedDecision]:
        """Measure every layer in every precision, and choose.

        Raises:
            ToolchainError: no choice fits the budget.
        """
        search = Search([made(table) for table in self.candidates], model, context, self.calls, self.cost)
        if not search.units:
            return Plan(choice={}, skipped=search.skipped)
        options = {unit: search.options(unit, number) for number, unit in enumerate(search.units)}
        trades = best_trades(options.values())
        now = sum(found[0].cost for found in options.values())
        chosen = self.choose(search, options, trades, now)
        picked = search.picked(chosen)
        kept = [path for unit in search.units for path in unit if path not in picked and path not in search.norms]
        return Plan(
            choice={path: search.decision(path, candidate) for path, candidate in picked.items()},
            skipped={**search.skipped, **dict.fromkeys(kept, "more exact as it is")},
            facts=PrecisionFacts(
                sensitivity={
                    path: [six_digits(math.sqrt(option.error)) for option in found[1:]]
                    for unit, found in options.items()
                    for path in unit
                    if path not in search.norms
                },
                error=six_digits(search.error_of(chosen)),
                error_in_pytorch=six_digits(search.distance(search.changed(picked))),
                cost_share=six_digits(cost_of(options, chosen) / now),
                uniform=[self.uniform_fact(search, options, i, now) for i in range(1, len(search.plans) + 1)],
                curve=Curve(
                    x=f"{self.cost} of the layers, as a share of what they were",
                    y="predicted relative L2 error",
                    points=tuple((six_digits(t.cost / now), six_digits(math.sqrt(t.error))) for t in thinned(trades)),
                    chosen=(six_digits(cost_of(options, chosen) / now), six_digits(search.error_of(chosen))),
                ),
            ),
            arrays=search.arrays(picked),
        )

    def choose(self, search: Search, options: Options, trades: Sequence[Trade], now: int) -> list[int]:
        """The option of each unit, 0 for as it is."""
        if self.budget is not None:
            limit = self.budget * now
            best = within(trades, limit)
            if best is None:
                share = trades[0].cost / now
                raise ToolchainError(
                    f"a budget of {self.budget} cannot be kept: the least that the candidates need is {share:.3f}",
                    where="budget",
                    help="raise it, or add a candidate of fewer bits",
                )
            rivals = [best.choices(), *(uniform(options, i) for i in range(1, len(search.plans) + 1))]
            return min((r for r in rivals if cost_of(options, r) <= limit), key=search.error_of)
        bound = self.max_error
        chosen: list[int] = [0] * len(options)
        for _ in range(ROUNDS):
            best = at_most(trades, bound**2)
            chosen = best.choices() if best else chosen
            measured = search.error_of(chosen)
            if measured <= self.max_error:
                return chosen
            bound *= 0.95 * self.max_error / measured
        return [0] * len(options)

    def uniform_fact(self, search: Search, options: Options, option: int, now: int) -> Json:
        """A candidate used wherever it can be: its cost and measured error."""
        chosen = uniform(options, option)
        return {
            "pass": search.passes[option - 1].name(),
            "cost_share": six_digits(cost_of(options, chosen) / now),
            "error": six_digits(search.error_of(chosen)),
        }

    def rewrite(self, model: nn.Module, plan: Plan[PickedDecision]) -> nn.Module:
        """Have each chosen candidate rewrite its layers."""
        for number, table in enumerate(self.candidates):
            mine = {path: each.decision for path, each in plan.choice.items() if each.candidate == number}
            prefix = f"{number}/"
            arrays = {name.removeprefix(prefix): a for name, a in plan.arrays.items() if name.startswith(prefix)}
            model = rewritten(made(table), model, mine, arrays)
        return model


Unit = tuple[str, ...]
"""Paths of layers that are chosen together."""

Options = Mapping[Unit, Sequence[Option]]
"""For each unit what it may be: as it is, then as each candidate has it."""


def rewritten(step: Pass, model: nn.Module, choice: Mapping[str, Decision], arrays: Mapping[str, Tensor]) -> nn.Module:
    """The model with some layers as a candidate decided; what is measured and what is shipped come from here."""
    if not choice:
        return model
    return step.rewrite(model, Plan(choice=choice, arrays=arrays, facts=ConvertedFacts(kept={}, alone=True)))


@dataclass
class Search:
    """The measurements that a choice rests on."""

    passes: Sequence[Pass]
    model: nn.Module
    context: Context
    calls: int
    unit: Literal["bytes", "macs"]

    @cached_property
    def plans(self) -> list[Plan]:
        """Each candidate's plan for the whole model, of which any part can be taken alone."""
        return [by_layer(step.planned(self.model, self.context), self.model) for step in self.passes]

    @cached_property
    def layers(self) -> list[str]:
        """Paths of the layers that some candidate would change, in the model's order."""
        named = {path for plan in self.plans for path in plan.choice}
        return [path for path, _ in self.model.named_modules() if path in named]

    @cached_property
    def norms(self) -> frozenset[str]:
        """Paths of norms that some candidate divides, for the layers behind them."""
        return frozenset(
            path for plan in self.plans for path, found in plan.choice.items() if isinstance(found, DividedNorm)
        )

    @cached_property
    def units(self) -> list[Unit]:
        """Layers that are chosen together: a norm and the layers behind it where a candidate smooths, else one each."""
        together: dict[str, set[str]] = {path: {path} for path in self.layers}
        for plan in self.plans:
            for found in plan.choice.values():
                if isinstance(found, DividedNorm):
                    same = [path for path, other in plan.choice.items() if array_of(other) == found.divided_by]
                    whole = set().union(*(together[path] for path in same))
                    together |= dict.fromkeys(whole, whole)
        order = {path: number for number, path in enumerate(self.layers)}
        return list(dict.fromkeys(tuple(sorted(together[path], key=order.__getitem__)) for path in self.layers))

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Layers that no candidate would change, and why."""
        reasons = {path: reason for plan in reversed(self.plans) for path, reason in plan.skipped.items()}
        return {path: reason for path, reason in reasons.items() if path not in self.layers}

    @cached_property
    def inputs(self) -> list[Inputs]:
        """Evenly spaced calibration calls."""
        calls = self.context.calibration
        return [calls[i * len(calls) // min(self.calls, len(calls))] for i in range(min(self.calls, len(calls)))]

    @cached_property
    def exact(self) -> Tensor:
        """What the model gives as it is."""
        return outputs(self.model, self.inputs)

    @cached_property
    def macs(self) -> Mapping[str, int]:
        """Multiply-accumulates of each layer in one call."""
        return macs_by_module(self.model, self.context.example or self.inputs[0])

    def options(self, unit: Unit, number: int) -> list[Option]:
        """A unit as it is, then as each candidate has it; one that leaves it alone is as it is."""
        as_is = Option(self.cost_in(self.model, unit), 0.0)
        found = [as_is]
        for index, plan in enumerate(self.plans):
            step = self.passes[index].name()
            self.context.say(number, len(self.units), f"measuring {step} alone in {unit[-1]}")
            picked = {path: index for path in unit if path in plan.choice}
            if not picked:
                found.append(as_is)
                continue
            changed = self.changed(picked)
            cost = self.cost_in(changed, unit)
            error = self.distance(self.as_run(changed, picked))
            option = Option(cost, error**2)
            found.append(option if math.isfinite(error) else as_is)
        return found

    def cost_in(self, model: nn.Module, unit: Unit) -> int:
        """What a unit costs in a model."""
        return sum(self.cost(path, model.get_submodule(path)) for path in unit)

    def cost(self, path: str, layer: nn.Module) -> int:
        """A layer's cost in the unit asked for; its weights count the bits that they have in a file."""
        size = cost(layer, None).bytes
        if self.unit == "bytes":
            return size
        weights = sum(parameter.numel() for parameter in self.model.get_submodule(path).parameters())
        return round(self.macs.get(path, 0) * size / weights) if weights else 0

    def picked(self, chosen: Sequence[int]) -> dict[str, int]:
        """For each layer that is changed the candidate (from 0), in the model's order, from the option of each unit."""
        found = {
            path: option - 1
            for unit, option in zip(self.units, chosen, strict=True)
            for path in unit
            if option and path in self.plans[option - 1].choice
        }
        return {path: found[path] for path in self.layers if path in found}

    def changed(self, picked: Mapping[str, int]) -> nn.Module:
        """The model with each of these layers rewritten by a candidate (by index)."""
        model = share(self.model)
        for index, step in enumerate(self.passes):
            choice = {path: self.plans[index].choice[path] for path, i in picked.items() if i == index}
            model = rewritten(step, model, choice, self.plans[index].arrays)
        return model

    def as_run(self, model: nn.Module, picked: Mapping[str, int]) -> nn.Module:
        """A rewritten model with layers marked ``rows`` as engines compute them; for errors, not for costs."""
        for path, index in picked.items():
            decision, layer = self.plans[index].choice[path], model.get_submodule(path)
            if isinstance(layer, QuantizedLinear) and isinstance(decision, Int8Layer) and decision.rows:
                original = self.model.get_submodule(path)
                assert isinstance(original, nn.Linear)
                name = array_of(decision)
                s = self.plans[index].arrays[name] if name else None
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, RowScaled(multiplied(original, s), layer.inverse))
        return model

    def distance(self, model: nn.Module) -> float:
        """Relative L2 error of a model's outputs; infinite where they are not finite."""
        error = relative_l2(self.exact, outputs(model, self.inputs))
        return error if math.isfinite(error) else math.inf

    def error_of(self, chosen: Sequence[int]) -> float:
        """Measured error of a whole mix; remembered."""
        key = tuple(chosen)
        if key not in self._measured:
            picked = self.picked(chosen)
            self._measured[key] = self.distance(self.as_run(self.changed(picked), picked))
        return self._measured[key]

    @cached_property
    def _measured(self) -> dict[tuple[int, ...], float]:
        return {}

    def decision(self, path: str, candidate: int) -> PickedDecision:
        """Whose decision a layer gets, and the decision."""
        name, found = self.passes[candidate].name(), self.plans[candidate].choice[path]
        return PickedDecision(candidate=candidate, pass_name=name, decision=found)

    def arrays(self, picked: Mapping[str, int]) -> dict[str, Tensor]:
        """The candidates' arrays for the layers that they were chosen for."""
        return {
            f"{index}/{name}": array
            for index, plan in enumerate(self.plans)
            for name, array in plan.arrays.items()
            if name in self.names(index, picked)
        }

    def names(self, index: int, picked: Mapping[str, int]) -> set[str]:
        """Names of the arrays that a candidate's layers need: their own, and those that smooth them."""
        choice = self.plans[index].choice
        return {name for path, i in picked.items() if i == index for name in choice[path].array_names(path)}


def by_layer(plan: Plan, model: nn.Module) -> Plan:
    """A plan without decisions that cannot be carried out alone: of modules that hold weights and other layers."""
    around = {path for path in plan.choice if any(True for _ in model.get_submodule(path).children())}
    return replace(
        plan,
        choice={path: entry for path, entry in plan.choice.items() if path not in around},
        skipped={
            **plan.skipped,
            **dict.fromkeys(around, "holds other layers: it is converted with all of them or not"),
        },
    )


def array_of(decision: Decision) -> str:
    """Name of the array that divides a norm or smooths a layer; empty where none does."""
    if isinstance(decision, DividedNorm):
        return decision.divided_by
    return decision.smooth.by if isinstance(decision, QuantizedLayer) and decision.smooth else ""


class RowScaled(nn.Module):
    """A linear layer in 8 bits with a scale for each row of its input, as engines compute a layer marked ``rows``."""

    def __init__(self, linear: nn.Linear, inverse: Tensor | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight_scales(weight)[:, None]
        self.weight, self.bias, self.inverse = (weight / scale).round() * scale, linear.bias, inverse

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        if self.inverse is not None:
            x = x * self.inverse
        q, step, zero = as_bytes(x.flatten(0, -2), by_row=True)
        return nn.functional.linear(((q - zero) * step).view(x.shape), self.weight, self.bias)


def made(table: Mapping[str, Any]) -> Pass:
    """The pass that a table names, with its parameters.

    Raises:
        ToolchainError: it is no pass of this family, or its parameters are wrong.
    """
    name, classes = str(table.get("pass")), []
    if importlib.util.find_spec(f"enginewright.passes.quantization.{name}"):
        module = importlib.import_module(f"enginewright.passes.quantization.{name}")
        own = [thing for thing in vars(module).values() if getattr(thing, "__module__", "") == module.__name__]
        classes = [thing for thing in own if isinstance(thing, type) and issubclass(thing, Pass)]
    if not classes or classes[0] is SearchPrecision:
        raise ToolchainError(f"{name!r} is no quantization pass to choose from", where="candidates")
    built: Pass = classes[0](**{key: value for key, value in table.items() if key != "pass"})
    return built


def outputs(model: nn.Module, calls: Sequence[Inputs]) -> Tensor:
    """All float outputs of all calls in one vector."""
    with torch.no_grad():
        return torch.cat([value.double().flatten() for call in calls for value in tensors(model(**call))])


def tensors(result: Any) -> list[Tensor]:
    """The float tensors of what a model returns."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple | list) else ()
    return [tensor for value in values for tensor in tensors(value)]


def uniform(options: Options, option: int) -> list[int]:
    """A mix in which every unit has the same option."""
    return [option] * len(options)


def cost_of(options: Options, chosen: Sequence[int]) -> int:
    """The cost of a mix."""
    return sum(found[option].cost for found, option in zip(options.values(), chosen, strict=True))


def thinned(trades: Sequence[Trade], most: int = 60) -> list[Trade]:
    """Evenly spaced trades, the first and the last always, for a curve."""
    if len(trades) <= most:
        return list(trades)
    return [trades[round(i * (len(trades) - 1) / (most - 1))] for i in range(most)]
