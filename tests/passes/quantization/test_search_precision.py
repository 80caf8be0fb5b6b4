"""Mixed precision from measured sensitivities."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.quantization.linear import QuantizedLinear
from enginewright.passes.quantization.quantize_int8 import Int8Layer, QuantizeInt8
from enginewright.passes.quantization.search_precision import PrecisionFacts, Search, SearchPrecision, made

INT8 = {"pass": "quantize_int8", "smallest": 0}
FOUND = PrecisionFacts(sensitivity={}, error=0.0, error_in_pytorch=0.0, cost_share=1.0, uniform=[])
"""Facts of a plan that nobody searched for."""


class Chain(nn.Module):
    """Three layers of one size; the middle one has an input that 8 bits serve badly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.a.weight[0] *= 3000
            self.b.weight[:, 0] /= 3000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(self.a(x))))


@pytest.fixture
def chain(calm: None) -> tuple[Chain, Context]:
    calls = [{"x": torch.randn(64, 16)} for _ in range(3)]
    return Chain().eval(), Context(calibration=calls, example=calls[0])


def quantized(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def test_the_sensitive_layer_stays_and_the_others_go(chain):
    model, context = chain
    result = SearchPrecision(candidates=(INT8,), max_error=0.02).apply(model, context)

    assert quantized(result.model) == {"a", "c"}
    assert result.plan.skipped == {"b": "more exact as it is"}
    sensitivity = result.plan.facts.sensitivity
    assert sensitivity["b"][0] > 5 * max(sensitivity["a"][0], sensitivity["c"][0])
    assert result.plan.facts.error <= 0.02
    assert result.plan.facts.uniform[0]["error"] > 0.02
    assert result.plan.choice["a"].pass_name == "quantize_int8"


def test_a_budget_is_kept_and_spent_where_it_matters(chain):
    model, context = chain
    uniform = QuantizeInt8(smallest=0).apply(Chain().eval(), context)
    share = uniform.after.bytes / uniform.before.bytes
    one_left = share + (1 - share) / 3 + 0.01
    result = SearchPrecision(candidates=(INT8,), budget=one_left).apply(model, context)

    assert quantized(result.model) == {"a", "c"}
    assert result.plan.facts.cost_share <= one_left
    assert result.after.bytes <= one_left * result.before.bytes


def test_at_the_size_of_uniform_8_bits_it_is_never_worse(subject):
    calls = [subject.inputs]
    context = Context(calibration=calls, example=calls[0])
    free = SearchPrecision(candidates=(INT8,), budget=1.0).plan(subject.copy(), context)
    [whole] = free.facts.uniform
    plan = SearchPrecision(candidates=(INT8,), budget=whole["cost_share"] + 1e-6).plan(subject.copy(), context)

    assert plan.facts.cost_share <= whole["cost_share"]
    assert plan.facts.error <= whole["error"]
    assert free.facts.error == 0
    assert free.choice == {}


def test_two_candidates_are_told_apart_and_replayed(chain):
    model, context = chain
    coarse = {"pass": "quantize_int8", "smallest": 0, "observer": "percentile", "percentile": 60.0}
    step = SearchPrecision(candidates=(coarse, INT8), max_error=0.02)
    plan = step.plan(model, context)

    assert {path: entry.candidate for path, entry in plan.choice.items()} == {"a": 1, "c": 1}
    again = step.rewrite(Chain().eval(), Plan.from_json(plan.as_json(), plan.arrays, by=step.declared))
    assert quantized(again) == {"a", "c"}


def test_an_error_that_nothing_keeps_leaves_the_model_and_says_so(chain):
    model, context = chain
    result = SearchPrecision(candidates=(INT8,), max_error=1e-9).apply(model, context)
    assert result.changed == ()
    assert set(result.plan.skipped) == {"a", "b", "c"}


def test_cost_by_multiply_accumulates_weighs_calls(calm):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.once = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.once(self.often(x)[:, :1])

    calls = [{"x": torch.randn(1, 10, 8)}]
    context = Context(calibration=calls, example=calls[0])
    step = SearchPrecision(candidates=(INT8,), cost="macs", budget=0.5)
    plan = step.plan(Twice().eval(), context)
    assert "often" in plan.choice, "the layer that is called on ten rows is ten elevenths of the cost"


def test_the_curve_falls_from_cheap_to_exact(chain):
    model, context = chain
    points = SearchPrecision(candidates=(INT8,)).plan(model, context).facts.curve.points
    costs, errors = zip(*points, strict=True)
    assert list(costs) == sorted(costs)
    assert list(errors) == sorted(errors, reverse=True)
    assert points[-1] == (1.0, 0.0)


def test_budgets_that_cannot_be_kept_and_passes_that_do_not_quantize_are_refused(chain):
    model, context = chain
    with pytest.raises(ToolchainError, match=r"a budget of 0\.01 cannot be kept: the least .* is 0\.\d+"):
        SearchPrecision(candidates=(INT8,), budget=0.01).plan(model, context)
    for name in ("prune_heads", "search_precision", "scales", "nothing"):
        with pytest.raises(ToolchainError, match=f"'{name}' is no quantization pass"):
            SearchPrecision(candidates=({"pass": name},))
    with pytest.raises(ToolchainError, match="observr"):
        SearchPrecision(candidates=({"pass": "quantize_int8", "observr": "max"},))


# What is measured is what comes out


class Block(nn.Module):
    """A norm with two layers that read it, so that smoothing folds into the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.c(torch.tanh(self.a(h)) * self.b(h))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def blocks(calm: None) -> tuple[Blocks, Context]:
    calls = [{"x": torch.randn(64, 64) * torch.linspace(0.1, 6, 64)} for _ in range(3)]
    return Blocks().eval(), Context(calibration=calls, example=calls[0])


def error_of(model: nn.Module, original: nn.Module, context: Context) -> float:
    with torch.no_grad():
        wanted = torch.stack([original(**call) for call in context.calibration]).double()
        got = torch.stack([model(**call) for call in context.calibration]).double()
    return float((got - wanted).norm() / wanted.norm())


INT4 = {"pass": "quantize_weights", "smallest": 0}
ALGORITHMS = {
    "rounding": {**INT4, "algorithm": "rtn"},
    "awq": {**INT4, "algorithm": "awq"},
    "gptq": {**INT4, "algorithm": "gptq"},
    "svd": {"pass": "quantize_svd", "smallest": 0, "rank": 8},
    "smoothquant": {**INT8, "smooth": 0.5},
    "int8": INT8,
    "fp8": {"pass": "quantize_fp8", "smallest": 0},
    "half precision": {"pass": "convert_dtype"},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_error_that_was_measured_is_that_of_the_model_that_comes_out(name, blocks):
    model, context = blocks
    original = copy.deepcopy(model)
    step = SearchPrecision(candidates=(ALGORITHMS[name],), max_error=0.5, calls=3)
    result = step.apply(copy.deepcopy(model), context)

    assert result.changed
    measured = result.plan.facts.error_in_pytorch
    assert measured > 1e-6
    assert error_of(result.model, original, context) == pytest.approx(measured, rel=1e-3)
    if not any(
        getattr(entry.decision, "rows", False) for entry in result.plan.choice.values()
    ):  # else engines compute more exactly
        assert result.plan.facts.error == pytest.approx(measured, rel=1e-3)
    assert result.plan.facts.uniform[0]["error"] == pytest.approx(result.plan.facts.error, rel=1e-3)
    replayed = step.rewrite(
        copy.deepcopy(model), Plan.from_json(result.plan.as_json(), result.plan.arrays, by=step.declared)
    )
    assert error_of(replayed, original, context) == pytest.approx(measured, rel=1e-3)


def bytes_of(layer: nn.Module) -> int:
    """Bytes of a layer's tensors as a file has them: of 4-bit codes two in a byte."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    four = {f"{path}.weight".lstrip(".") for path, part in layer.named_modules() if vars(part).get("weight_bits") == 4}
    return sum(t.numel() * t.element_size() // (2 if name in four else 1) for name, t in tensors)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_error_and_bytes_of_a_single_candidate_are_those_of_what_its_plan_ships(name, blocks):
    """Not through the facts, which have six digits."""
    model, context = blocks
    step = SearchPrecision(candidates=(ALGORITHMS[name],), budget=1.0, calls=3)
    search = Search([made(ALGORITHMS[name])], model, context, calls=3, unit="bytes")
    everywhere = search.picked([1] * len(search.units))
    assert {"blocks.0.a", "blocks.1.c"} <= everywhere.keys()
    measured = search.distance(search.changed(everywhere))
    costs = [search.options(unit, number)[1].cost for number, unit in enumerate(search.units)]

    choice = {path: search.decision(path, candidate) for path, candidate in everywhere.items()}
    plan = step.declared.checked(Plan(choice=choice, facts=FOUND, arrays=search.arrays(everywhere)))
    read = Plan.from_json(plan.as_json(), plan.arrays, by=step.declared)
    shipped = step.carry_out(copy.deepcopy(model), read, Context())

    assert measured > 1e-6
    assert error_of(shipped, model, context) == pytest.approx(measured, rel=1e-6)
    for unit, cost in zip(search.units, costs, strict=True):
        assert sum(bytes_of(shipped.get_submodule(path)) for path in unit) == cost
        assert cost < sum(bytes_of(model.get_submodule(path)) for path in unit) or "norm" in unit[0]


@pytest.mark.parametrize("name", ["smoothquant", "awq", "svd"])
def test_a_layer_picked_alone_takes_the_array_along_that_bears_another_layers_name(name, blocks):
    model, context = blocks
    for block in model.blocks:
        block.norm = nn.LayerNorm(64, elementwise_affine=False)  # nothing to fold into: layers are chosen one by one
    step = SearchPrecision(candidates=(ALGORITHMS[name],), max_error=0.5, calls=3)
    search = Search([made(ALGORITHMS[name])], model, context, calls=3, unit="bytes")
    alone = {"blocks.0.b": 0}
    assert ("blocks.0.b",) in search.units
    arrays = search.arrays(alone)
    assert "0/blocks.0.a.smooth" in arrays
    assert all(array.startswith(("0/blocks.0.b.", "0/blocks.0.a.smooth")) for array in arrays)

    plan = Plan(choice={"blocks.0.b": search.decision("blocks.0.b", 0)}, facts=FOUND, arrays=arrays)
    read = Plan.from_json(plan.as_json(), plan.arrays, by=step.declared)
    shipped = step.carry_out(copy.deepcopy(model), read, Context())
    assert error_of(shipped, model, context) == pytest.approx(search.distance(search.changed(alone)), rel=1e-6)


def test_what_a_candidate_decided_is_held_against_what_its_pass_declares(blocks):
    model, context = blocks
    step = SearchPrecision(candidates=(ALGORITHMS["smoothquant"], ALGORITHMS["gptq"]), budget=0.2)
    plan = step.plan(model, context)
    path, picked = next((p, each) for p, each in plan.choice.items() if each.pass_name == "quantize_weights")
    written = json.loads(plan.as_json())["choice"][path]
    assert step.declared.checked(plan).choice == plan.choice

    def refused(**changes):
        spoiled = Plan(choice={path: {**written, **changes}}, facts=FOUND)
        with pytest.raises(ToolchainError) as caught:
            step.declared.checked(spoiled)
        return caught.value.message, caught.value.where

    inner = written["decision"]
    where = f"choice.{path}"
    assert refused(decision={**inner, "blocks": 8}) == (
        "a decision of quantize_weights has no setting 'blocks'",
        f"{where}.decision.blocks",
    )
    message, place = refused(decision={**inner, "precision": "int3"}, precision="int3")
    assert message.startswith("a decision of quantize_weights: precision is 'int3'; it is one of int4, int8")
    assert place == f"{where}.decision.precision"
    message, place = refused(candidate=0)
    assert "is of candidate 0, 'quantize_weights'; the candidates are quantize_int8, quantize_weights" in message
    assert place == f"{where}.candidate"
    assert refused(candidate=-1)[0].startswith("a decision of search_precision is of candidate -1")
    message, place = refused(block=64)  # what targets read is not what is carried out
    assert (message, place) == ("a decision of search_precision has no setting 'block'", f"{where}.block")
    assert "decision is 3; it must be a table" in refused(decision=3)[0]

    stray = {**plan.arrays, f"0/{path}.codes": plan.arrays[f"1/{path}.codes"]}
    with pytest.raises(ToolchainError, match=r"no decision of search_precision declares the plan's array '0/"):
        step.declared.checked(replace(plan, arrays=stray))
    assert picked.decision.algorithm == "gptq"


def test_a_candidate_with_decisions_of_a_new_version_makes_older_plans_unreadable(monkeypatch, tmp_path):
    step = SearchPrecision(candidates=(INT8, ALGORITHMS["svd"]))
    Plan(choice={}, facts=FOUND).write(tmp_path / "p.json", by=step.declared)
    assert Plan.read(tmp_path / "p.json", step.declared).choice == {}
    monkeypatch.setattr(Int8Layer, "version", 2)
    assert step.declared.version == 2
    with pytest.raises(ToolchainError, match="decisions of search_precision of version 1; this version reads 2"):
        Plan.read(tmp_path / "p.json", step.declared)


@pytest.mark.parametrize("name", ["awq", "gptq", "svd", "smoothquant"])
def test_what_a_candidate_gives_everywhere_is_what_the_pass_itself_gives(name, blocks):
    model, context = blocks
    table = ALGORITHMS[name]
    alone = made(table).apply(copy.deepcopy(model), context)
    searched = SearchPrecision(candidates=(table,), max_error=0.5).apply(copy.deepcopy(model), context)
    assert error_of(searched.model, model, context) == pytest.approx(error_of(alone.model, model, context), rel=1e-6)
    assert searched.plan.arrays.keys() == {f"0/{name}" for name in alone.plan.arrays}


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_a_norm_is_divided_with_the_layers_behind_it_or_not_at_all(name, blocks):
    model, context = blocks
    with torch.no_grad():
        model.blocks[0].a.weight *= 30  # so that one block is worth keeping
    free = SearchPrecision(candidates=(ALGORITHMS[name],), max_error=0.5).plan(copy.deepcopy(model), context)
    everywhere = free.facts.uniform[0]["error"]
    result = SearchPrecision(candidates=(ALGORITHMS[name],), max_error=everywhere * 0.8).apply(
        copy.deepcopy(model), context
    )
    for number in range(2):
        whole = {f"blocks.{number}.{child}" for child in ("norm", "a", "b")}
        assert whole <= set(result.changed) or not whole & set(result.changed), result.changed
    assert 0 < len(result.changed) < 8
    assert error_of(result.model, model, context) == pytest.approx(result.plan.facts.error_in_pytorch, rel=1e-3)


def test_four_bits_cost_less_than_eight(blocks):
    model, context = blocks
    step = SearchPrecision(candidates=(INT8, ALGORITHMS["rounding"]), max_error=0.5)
    eight, four = step.plan(copy.deepcopy(model), context).facts.uniform
    assert eight["cost_share"] == pytest.approx(0.28, abs=0.02)
    assert four["cost_share"] < 0.65 * eight["cost_share"]
    tight = SearchPrecision(candidates=(INT8, ALGORITHMS["rounding"]), budget=0.2).apply(model, context)
    assert {entry.pass_name for entry in tight.plan.choice.values()} >= {"quantize_weights"}
    assert tight.after.bytes <= 0.21 * tight.before.bytes


def test_candidates_of_other_kinds_stand_side_by_side(blocks):
    model, context = blocks
    original = copy.deepcopy(model)
    candidates = (ALGORITHMS["half precision"], ALGORITHMS["smoothquant"], ALGORITHMS["gptq"])
    result = SearchPrecision(candidates=candidates, budget=0.24, calls=3).apply(model, context)
    assert len({entry.pass_name for entry in result.plan.choice.values()}) > 1
    assert error_of(result.model, original, context) == pytest.approx(result.plan.facts.error_in_pytorch, rel=1e-3)
