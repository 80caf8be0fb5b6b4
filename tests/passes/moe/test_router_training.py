"""Routers under training: what tells them that a load is uneven, and that gradients reach them."""

import copy

import pytest
import torch

from enginewright.passes.contract import Context
from enginewright.passes.moe.dense_to_moe import DenseToMoe
from enginewright.passes.moe.experts import MixtureOfExperts, imbalance
from enginewright.passes.recovery.distill import Distill

FORMS = ["masked", "capacity", "nonzero"]


def mixture(subject, **settings):
    """One layer of a converted model, learning."""
    step = DenseToMoe(**{"router": "random", **settings})
    model = step.apply(subject.copy(), Context(calibration=[subject.inputs])).model
    layer = next(module for module in model.modules() if isinstance(module, MixtureOfExperts))
    layer.learns = True
    return layer


def routers(model):
    return {n: p for n, p in model.named_parameters() if ".router." in n}


# The loss


def test_an_even_load_gives_1_and_one_expert_for_all_gives_as_many_as_there_are():
    even = torch.full((2, 6, 3), 1 / 3)
    turns = torch.arange(6).remainder(3)[None, :, None].expand(2, -1, -1)
    assert imbalance(even, turns) == pytest.approx(1)
    sure = torch.tensor([1.0, 0, 0]).expand(2, 6, 3)
    assert imbalance(sure, torch.zeros(2, 6, 1, dtype=torch.long)) == pytest.approx(3)


def test_of_several_choices_each_counts_its_part():
    shares = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]])  # one sample of two tokens
    chosen = torch.tensor([[[0, 1], [2, 1]]])  # f = 1/4, 1/2, 1/4; P = 0.3, 0.3, 0.4
    assert imbalance(shares, chosen) == pytest.approx(3 * (0.25 * 0.3 + 0.5 * 0.3 + 0.25 * 0.4))


@pytest.mark.parametrize("form", FORMS)
def test_a_crowded_expert_costs_more_and_the_gradient_sends_tokens_away(dit, form):
    layer = mixture(dit, form=form, top_k=1)
    x = torch.randn(2, 16, 32)
    layer(x)
    before = layer.balance_loss.detach()
    with torch.no_grad():
        layer.router.bias[3] += 20

    layer(x)
    assert layer.balance_loss > 0.99 * 12 > 2 * before
    layer.balance_loss.backward()
    assert layer.router.bias.grad[3] > 0
    assert (layer.router.bias.grad[:3] < 0).all()
    assert layer.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 12}])
def test_where_nothing_can_be_balanced_nothing_is_said(dit, settings):
    layer = mixture(dit, **settings)
    layer(torch.randn(2, 16, 32))
    assert layer.balance_loss is None


# The gates


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", ["one", "softmax"])
def test_learning_changes_no_answer(dit, gate, form):
    layer = mixture(dit, gate=gate, form=form)
    x = torch.randn(2, 16, 32)
    learning = layer(x)
    layer.learns, layer.balance_loss = False, None
    assert torch.equal(layer(x), learning)
    assert layer.balance_loss is None


@pytest.mark.parametrize("form", FORMS)
def test_gates_of_one_hand_the_gradient_of_the_softmax_on(dit, form):
    """Beside the same layer with softmax gates: there the gradient is that of the gates, computed by autograd."""
    layer = mixture(dit, gate="one", form=form)
    x = torch.randn(2, 16, 32)
    answers = layer(x)
    torch.manual_seed(1)
    wish = torch.randn_like(answers)
    found = torch.autograd.grad((answers * wish).sum(), layer.router.weight)[0]
    layer.gate = "softmax"
    wanted = torch.autograd.grad((layer(x) * wish).sum(), layer.router.weight)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert wanted.abs().max() > 1e-3

    layer.gate, layer.learns = "one", False
    assert torch.autograd.grad((layer(x) * wish).sum(), layer.router.weight, allow_unused=True) == (None,)


# A distillation


def converted(subject, **settings):
    return DenseToMoe(**settings).apply(subject.copy(), Context(calibration=[subject.inputs])).model


def taught(subject):
    return Context(calibration=[subject.inputs], original=subject.model)


@pytest.mark.parametrize("gate", ["one", "softmax"])
def test_routers_alone_learn_to_answer_like_the_dense_layer(dit, gate):
    student = converted(dit, router="random", gate=gate, experts=4, top_k=1, form="masked")
    before = copy.deepcopy(student.state_dict())

    plan = Distill(steps=40, batch=1, lr=2e-2, balance=0, train=("*router",)).plan(student, taught(dit))

    error = plan.facts.relative_error
    assert error["after"] < 0.95 * error["before"]
    assert set(plan.choice) == {"blocks.0.mlp.router", "blocks.1.mlp.router"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("recompute", [False, True])
def test_the_weight_of_balance_spreads_the_load(dit, recompute):
    student = converted(dit, router="fitted", experts=4, top_k=1, form="capacity")
    with torch.no_grad():
        for name, parameter in routers(student).items():
            if name.endswith("bias"):
                parameter[0] += 1

    def uneven(model):
        mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
        for module in mixtures:
            module.learns = True
        dit.output(model)
        return max(float(module.balance_loss) for module in mixtures)

    left = {}
    for balance in (0.0, 1.0):
        step = Distill(steps=20, batch=1, lr=2e-2, balance=balance, train=("*router",), recompute=recompute)
        left[balance] = uneven(step.apply(copy.deepcopy(student), taught(dit)).model)
    assert left[1.0] < 1.3 < uneven(student)
    assert left[1.0] < left[0.0] - 0.1


def test_a_whole_conversion_is_recovered(dit):
    student = converted(dit, form="nonzero")
    error = Distill(steps=30, batch=1, lr=3e-3).plan(student, taught(dit)).facts.relative_error
    assert error["after"] < 0.6 * error["before"]
