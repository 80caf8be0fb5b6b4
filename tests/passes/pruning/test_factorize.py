from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.pruning.factorize import Factorize
from tests.engines import built, exported, in_onnxruntime
from tests.passes.conftest import SUBJECTS


def low_rank(rank: int, inputs: int = 40, outputs: int = 32) -> nn.Sequential:
    """A layer whose weight has this rank."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, rank) @ torch.randn(rank, inputs) / inputs**0.5)
    return nn.Sequential(layer)


# Exactness


@pytest.mark.parametrize("method", ["weight", "activation"])
@pytest.mark.parametrize("rank", ["fixed", "energy"])
def test_a_weight_of_low_rank_loses_nothing(method, rank):
    model, x = low_rank(5), torch.randn(200, 40)
    before = model(x)
    step = Factorize(method=method, rank=rank, fixed=5, energy=1 - 1e-10)
    result = step.apply(model, Context(calibration=[{"input": x}]))
    assert result.plan.choice["0"].rank == 5
    assert result.plan.choice["0"].kept_norm == pytest.approx(1)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)
    assert result.after.parameter_count == 5 * (40 + 32) + 32


def test_two_factors_are_the_layer_with_their_product(subject):
    """The factored model is the model whose weights are the products."""
    step = Factorize(share=0.5, smallest=1024)
    result = step.apply(subject.copy(), Context())
    masked = subject.copy()
    for path in result.changed:
        with torch.no_grad():
            masked.get_submodule(path).weight.copy_(
                result.plan.arrays[f"{path}/out"] @ result.plan.arrays[f"{path}/in"]
            )
    torch.testing.assert_close(subject.output(result.model), subject.output(masked), atol=1e-5, rtol=1e-5)
    assert (subject.output(result.model) - subject.output(subject.model)).abs().max() > 1e-2
    assert len(result.changed) >= 8


def test_the_output_is_nearer_when_inputs_are_known():
    """Inputs that mostly lie in a few directions: the error of the output is what counts."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 32))
    x = torch.randn(500, 40) * torch.logspace(1, -3, 40)
    model.requires_grad_(False)
    wanted, errors = model(x), {}
    for method in ("weight", "activation"):
        step = Factorize(method=method, rank="fixed", fixed=6)
        done = step.apply(copy.deepcopy(model), Context(calibration=[{"input": x[:250]}, {"input": x[250:]}]))
        errors[method] = float((done.model(x) - wanted).norm())
    exact = torch.linalg.svdvals((x @ model[0].weight.T).double())
    assert errors["activation"] == pytest.approx(float(exact[6:].norm()), rel=0.05)  # the least that rank 6 allows
    assert errors["weight"] > 3 * errors["activation"]


# How much


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_budget_is_kept(share):
    plan = Factorize(share=share).plan(low_rank(32), Context())
    spent = plan.choice["0"].rank * (40 + 32)
    assert share * 40 * 32 - (40 + 32) < spent <= share * 40 * 32


def test_energy_by_hand():
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0] + [0.0] * 29)))
    for energy, rank in ((0.6, 1), (0.7, 2), (0.95, 3)):  # squares 9, 4, 1 of 14
        assert Factorize(rank="energy", energy=energy).plan(model, Context()).choice["0"].rank == rank


# What is left alone


def test_each_layer_left_alone_has_its_reason():
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"full": nn.Linear(32, 32), "small": nn.Linear(4, 4), "odd": Odd(32, 32), "out": nn.Linear(32, 32)}
    )
    before = copy.deepcopy(model.state_dict())
    result = Factorize(rank="fixed", fixed=16, exclude=("out",)).apply(model, Context())
    assert result.changed == ()
    assert result.plan.skipped == {
        "full": "rank 16 would need 1024 weights in place of 1024",
        "small": "has 16 weights, fewer than 1024",
        "odd": "it is a Odd, not a plain Linear",
        "out": "excluded by 'out'",
    }
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    with pytest.raises(ToolchainError, match="needs calibration inputs"):
        Factorize(method="activation").plan(model, Context())


def test_a_layer_that_never_runs_is_left_alone():
    model = nn.Sequential(nn.Linear(32, 32))
    model.forward = lambda input: input
    plan = Factorize(method="activation").plan(model, Context(calibration=[{"input": torch.randn(2, 32)}]))
    assert plan.skipped == {"0": "the calibration inputs never reach it"}


def test_a_plan_is_replayed_from_its_arrays(dit, tmp_path):
    step, context = Factorize(method="activation"), Context(calibration=[dit.inputs])
    plan = step.plan(dit.model, context)
    assert step.plan(dit.model, context).digest() == plan.digest()
    plan.write(tmp_path / "plan.json")
    one, two = (
        step.rewrite(dit.copy(), plan),
        step.rewrite(dit.copy(), Plan.read(tmp_path / "plan.json", step.declared)),
    )
    torch.testing.assert_close(one.state_dict(), two.state_dict(), atol=0, rtol=0)
    empty = step.rewrite(dit.copy().to("meta"), plan)
    assert all(parameter.is_meta for parameter in empty.parameters())


# What a user can mend


def test_what_a_user_can_mend_is_said(dit):
    with pytest.raises(ToolchainError, match="meta device"):
        Factorize().plan(dit.copy().to("meta"), Context())
    with pytest.raises(ToolchainError, match="exclude 'x' matches no linear layer"):
        Factorize(exclude=("x",)).plan(dit.model, Context())
    broken = low_rank(3)
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(ToolchainError, match="weight or inputs are not finite"):
        Factorize().plan(broken, Context())
    plan = Factorize().plan(low_rank(3), Context())
    with pytest.raises(ToolchainError, match=r"a weight of shape \(32, 40\); this one has \(32, 32\)"):
        Factorize().rewrite(nn.Sequential(nn.Linear(32, 32)), plan)
    with pytest.raises(ToolchainError, match="factorize: share is 1"):
        Factorize(share=1)


# What follows


@pytest.mark.parametrize("name", ["reference_dit"])
def test_a_factored_model_exports_runs_and_builds(name, tmp_path):
    subject = SUBJECTS[name]()
    model = Factorize(share=0.5).apply(subject.copy(), Context()).model
    path = exported(model, subject.inputs, tmp_path)
    torch.testing.assert_close(in_onnxruntime(path, subject.inputs), subject.output(model), atol=1e-4, rtol=0)
    pytest.importorskip("tensorrt_rtx")
    assert (built(path, subject.inputs) / "engine.plan").stat().st_size > 1000
