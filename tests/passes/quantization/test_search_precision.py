"""Mixed precision from measured sensitivities."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.contract import Context, Plan
from passes.quantization.linear import QuantizedLinear
from passes.quantization.quantize_int8 import QuantizeInt8
from passes.quantization.search_precision import SearchPrecision
from toolchain.errors import ToolchainError

INT8 = {"pass": "quantize_int8", "smallest": 0}


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
    sensitivity = result.plan.facts["sensitivity"]
    assert sensitivity["b"][0] > 5 * max(sensitivity["a"][0], sensitivity["c"][0])
    assert result.plan.facts["error"] <= 0.02
    assert result.plan.facts["uniform"][0]["error"] > 0.02
    assert result.plan.choice["a"]["pass"] == "quantize_int8"


def test_a_budget_is_kept_and_spent_where_it_matters(chain):
    model, context = chain
    uniform = QuantizeInt8(smallest=0).apply(Chain().eval(), context)
    share = uniform.after.bytes / uniform.before.bytes
    one_left = share + (1 - share) / 3 + 0.01
    result = SearchPrecision(candidates=(INT8,), budget=one_left).apply(model, context)

    assert quantized(result.model) == {"a", "c"}
    assert result.plan.facts["cost_share"] <= one_left
    assert result.after.bytes <= one_left * result.before.bytes


def test_at_the_size_of_uniform_8_bits_it_is_never_worse(subject):
    calls = [subject.inputs]
    context = Context(calibration=calls, example=calls[0])
    free = SearchPrecision(candidates=(INT8,), budget=1.0).plan(subject.copy(), context)
    [whole] = free.facts["uniform"]
    plan = SearchPrecision(candidates=(INT8,), budget=whole["cost_share"] + 1e-6).plan(subject.copy(), context)

    assert plan.facts["cost_share"] <= whole["cost_share"]
    assert plan.facts["error"] <= whole["error"]
    assert free.facts["error"] == 0
    assert free.choice == {}


def test_two_candidates_are_told_apart_and_replayed(chain):
    model, context = chain
    coarse = {"pass": "quantize_int8", "smallest": 0, "observer": "percentile", "percentile": 60.0}
    step = SearchPrecision(candidates=(coarse, INT8), max_error=0.02)
    plan = step.plan(model, context)

    assert {path: entry["candidate"] for path, entry in plan.choice.items()} == {"a": 1, "c": 1}
    again = step.rewrite(Chain().eval(), Plan.from_json(plan.as_json(), plan.arrays))
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
    points = SearchPrecision(candidates=(INT8,)).plan(model, context).facts["curve"]["points"]
    costs, errors = zip(*points, strict=True)
    assert list(costs) == sorted(costs)
    assert list(errors) == sorted(errors, reverse=True)
    assert points[-1] == [1.0, 0.0]


def test_budgets_that_cannot_be_kept_and_passes_that_do_not_quantize_are_refused(chain):
    model, context = chain
    with pytest.raises(ToolchainError, match=r"a budget of 0\.01 cannot be kept: the least .* is 0\.\d+"):
        SearchPrecision(candidates=(INT8,), budget=0.01).plan(model, context)
    for name in ("prune_heads", "search_precision", "scales", "nothing"):
        with pytest.raises(ToolchainError, match=f"'{name}' is no quantization pass"):
            SearchPrecision(candidates=({"pass": name},))
    with pytest.raises(ToolchainError, match="observr"):
        SearchPrecision(candidates=({"pass": "quantize_int8", "observr": "max"},))
