from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.pruning.sparsify_2_4 import SparseWeight, Sparsify24, largest_two, sparsegpt
from tests.engines import built, exported, in_onnxruntime


def is_sparse(weight):
    return bool(((weight.unflatten(-1, (-1, 4)) != 0).sum(dim=-1) <= 2).all())


# Exactness


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_every_four_weights_hold_two_zeros_and_the_rest_stays(subject, method):
    step = Sparsify24(method=method)
    result = step.apply(subject.copy(), Context(calibration=[subject.inputs]))
    assert len(result.changed) >= 8
    masked = subject.copy()
    for path in result.changed:
        weight = result.model.get_submodule(path).weight
        assert is_sparse(weight)
        kept = masked.get_submodule(path).weight
        if method == "magnitude":
            assert torch.equal(weight[weight != 0], kept[weight != 0])
            with torch.no_grad():
                kept.mul_(weight != 0)
        else:
            assert not torch.equal(weight[weight != 0], kept[weight != 0])
            with torch.no_grad():
                kept.copy_(weight)
    after = subject.output(result.model)
    torch.testing.assert_close(after, subject.output(masked), atol=1e-5, rtol=0)
    assert (after - subject.output(subject.model)).abs().max() > 1e-2


def test_weights_that_are_sparse_already_stay_as_they_are():
    model = nn.Sequential(nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 0, 0, 1]).repeat(8))
    before, x = copy.deepcopy(model[0].weight), torch.randn(64, 32)
    for method in ("magnitude", "sparsegpt"):
        done = Sparsify24(method=method).apply(copy.deepcopy(model), Context(calibration=[{"input": x}]))
        torch.testing.assert_close(done.model[0].weight, before, atol=1e-6, rtol=0)
        assert done.plan.choice["0"] == SparseWeight(pattern="2:4", kept_norm=1.0)


def test_the_two_largest_of_four_by_hand():
    score = torch.tensor([[1.0, 4, 3, 2, 5, 5, 5, 5]])
    assert largest_two(score).tolist() == [[False, True, True, False, True, True, False, False]]


def test_sparsegpt_loses_less_of_the_output():
    """Inputs that go together: columns that stay make up for those that went."""
    mix = torch.randn(256, 256) / 16
    x = torch.randn(1000, 256) @ (mix + 0.3 * torch.randn(256, 1) @ torch.randn(1, 256) / 16)
    model = nn.Sequential(nn.Linear(256, 64)).requires_grad_(False)
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        done = Sparsify24(method=method).apply(copy.deepcopy(model), Context(calibration=[{"input": x}]))
        errors[method] = float((done.model(x) - model(x)).norm())
    assert errors["sparsegpt"] < 0.8 * errors["magnitude"]


def test_sparsegpt_on_inputs_apart_is_magnitude():
    """With X^T X a multiple of the identity nothing can make up for anything."""
    weight = torch.randn(8, 256)
    found = sparsegpt(weight, 7 * torch.eye(256, dtype=torch.float64), where="")
    torch.testing.assert_close(found, weight * largest_two(weight.abs()))


def test_inputs_that_are_always_zero_do_no_harm():
    weight, x = torch.randn(8, 16), torch.randn(50, 16).double()
    x[:, 3] = 0
    found = sparsegpt(weight, x.T @ x, where="")
    assert found.isfinite().all()
    assert is_sparse(found)
    assert not found[:, 3].any()


def test_sparsegpt_does_not_write_into_a_double_weight():
    weight = torch.randn(8, 16, dtype=torch.float64)
    before = weight.clone()
    sparsegpt(weight, torch.eye(16, dtype=torch.float64), where="")
    assert torch.equal(weight, before)


def test_the_mask_is_that_of_modelopt():
    sparsity = importlib.import_module("modelopt.torch.sparsity")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    ours = Sparsify24().apply(copy.deepcopy(model), Context()).model
    theirs = sparsity.export(sparsity.sparsify(copy.deepcopy(model), "sparse_magnitude"))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.weight, other.weight)


# What is left alone


def test_each_layer_left_alone_has_its_reason():
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"odd": Odd(32, 32), "small": nn.Linear(4, 4), "wide": nn.Linear(34, 34), "out": nn.Linear(32, 32)}
    )
    model["conv"] = nn.Conv2d(4, 4, 1)
    before = copy.deepcopy(model.state_dict())
    result = Sparsify24(exclude=("out",)).apply(model, Context())
    assert result.changed == ()
    assert result.plan.skipped == {
        "odd": "it is a Odd, not a plain Linear",
        "small": "has 16 weights, fewer than 1024",
        "wide": "its 34 inputs are no multiple of 4",
        "out": "excluded by 'out'",
        "conv": "Conv2d: only linear layers become sparse",
    }
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    idle = nn.Sequential(nn.Linear(32, 32))
    idle.forward = lambda input: input
    plan = Sparsify24(method="sparsegpt").plan(idle, Context(calibration=[{"input": torch.randn(2, 32)}]))
    assert plan.skipped == {"0": "the calibration inputs never reach it"}


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_plan_is_repeatable_and_says_who_gains(dit, method):
    step, context = Sparsify24(method=method), Context(calibration=[dit.inputs], example=dit.inputs)
    plan = step.plan(dit.model, context)
    assert step.plan(dit.model, context).digest() == plan.digest()
    assert "none on a CPU" in plan.facts.gains
    one = step.rewrite(dit.copy(), plan)
    two = step.rewrite(dit.copy(), Plan.from_json(plan.as_json(), plan.arrays, by=step.declared))
    torch.testing.assert_close(one.state_dict(), two.state_dict(), atol=0, rtol=0)
    result = step.apply(dit.copy(), context)
    assert result.before == result.after  # zeros are weights like any other


# What a user can mend


def test_what_a_user_can_mend_is_said(dit):
    with pytest.raises(ToolchainError, match="'sparsegpt' needs calibration inputs"):
        Sparsify24(method="sparsegpt").plan(dit.model, Context())
    with pytest.raises(ToolchainError, match="meta device"):
        Sparsify24().plan(dit.copy().to("meta"), Context())
    with pytest.raises(ToolchainError, match="exclude 'x' matches no linear layer"):
        Sparsify24(exclude=("x",)).plan(dit.model, Context())
    broken = nn.Sequential(nn.Linear(32, 32))
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(ToolchainError, match="its weight is not finite"):
        Sparsify24().plan(broken, Context())
    with pytest.raises(ToolchainError, match="its inputs are not finite"):
        sparsegpt(torch.randn(4, 4), torch.full((4, 4), float("nan")), where="a")
    plan = Plan(choice={"0": SparseWeight(pattern="2:4", kept_norm=1.0)}, arrays={"0/weight": torch.zeros(8, 8)})
    with pytest.raises(ToolchainError, match=r"a weight \(8, 8\); this has \(4, 4\)"):
        Sparsify24(method="sparsegpt").rewrite(nn.Sequential(nn.Linear(4, 4)), plan)


# What follows


def test_a_sparse_model_exports_runs_and_builds_with_the_flag(dit, tmp_path):
    result = Sparsify24().apply(dit.copy(), Context())
    path = exported(result.model, dit.inputs, tmp_path)
    torch.testing.assert_close(in_onnxruntime(path, dit.inputs), dit.output(result.model), atol=1e-4, rtol=0)
    pytest.importorskip("tensorrt_rtx")
    assert (built(path, dit.inputs, result.plan.choice) / "engine.plan").stat().st_size > 1000
