"""Every pass keeps the contract, whatever it does."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from passes.contract import Context, Plan, cost, macs
from toolchain import catalog, sources
from validation.inputs import draw


def model_and_context() -> tuple[torch.nn.Module, Context]:
    model = sources.load("dit:tiny")
    calls = [{k: torch.from_numpy(v) for k, v in draw(model.inputs, seed=i).items()} for i in range(2)]
    return model.module, Context(calibration=calls, example=calls[0])


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_plan_changes_nothing_and_rewrite_does_what_the_plan_says(name: str) -> None:
    module, context = model_and_context()
    step = catalog.pass_class(name)()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    training, needs = module.training, [p.requires_grad for p in module.parameters()]
    plan = step.plan(module, context)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert module.training == training
    assert [p.requires_grad for p in module.parameters()] == needs
    assert all(p.grad is None for p in module.parameters())

    assert step.plan(module, context).digest() == plan.digest(), "planning twice gives two plans"
    assert plan.choice, "a pass that has nothing to do on the tiny DiT has no contract test"
    paths = {path for path, _ in module.named_modules()}
    assert set(plan.choice) <= paths
    assert set(plan.skipped) <= paths
    assert not set(plan.choice) & set(plan.skipped)
    assert all(len(reason) > 5 for reason in plan.skipped.values())
    json.loads(plan.as_json())

    one = step.rewrite(copy.deepcopy(module), plan)
    two = step.rewrite(copy.deepcopy(module), Plan.from_json(plan.as_json()))
    with torch.no_grad():
        outputs = [net(**context.calibration[0]) for net in (module, one, two)]
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[1]), "the rewrite changed nothing"


@pytest.mark.parametrize("name", catalog.entries("passes"))
def test_a_rewrite_never_writes_into_the_tensors_it_was_handed(name: str) -> None:
    module, context = model_and_context()
    held = [(t, t.clone()) for t in (*module.parameters(), *module.buffers())]
    catalog.pass_class(name)().apply(module, context)
    assert all(torch.equal(tensor, copy) for tensor, copy in held)


def test_cost_counts_by_hand() -> None:
    net = torch.nn.Linear(8, 4)
    found = cost(net, {"input": torch.zeros(3, 8)})
    assert (found.parameter_count, found.macs, found.bytes) == (36, 96, 144)


def test_attention_is_counted_too() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert macs(Attention(), {"x": torch.zeros(1, 2, 5, 4)}) == 2 * 2 * 5 * 5 * 4
