from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.tokens import policy
from enginewright.passes.tokens.dropping import KeptCount
from enginewright.passes.tokens.policy import HideStep, hide_tokens, log_probability, policy_loss, reward
from enginewright.passes.tokens.prune_tokens import PruneTokens
from tests.passes.conftest import vit


def plan_for(subject, borders=(0, 1), keep=0.5) -> Plan:
    """With interpreters that score about half of all tokens above 0.5."""
    step = PruneTokens(method="policy", keep=keep, borders=borders)
    plan = step.plan(subject.model, Context(calibration=[subject.inputs]))
    generator = torch.Generator().manual_seed(3)
    arrays = {
        name: torch.randn(array.shape, generator=generator) * (0 if name.endswith("bias") else 0.5)
        for name, array in sorted(plan.arrays.items())
    }
    return Plan(choice=plan.choice, arrays=arrays)


def hidden(subject, plan: Plan):
    model = subject.copy()
    return model, hide_tokens(model, plan)


def test_each_picture_keeps_what_scores_above_half_and_borders_are_nested():
    subject = vit("sdpa")
    model, steps = hidden(subject, plan_for(subject))
    subject.output(model)
    first, second = steps
    for step in steps:
        assert torch.equal(step.kept, step.there & (step.interpreter(step.seen) > 0.5))
    assert first.there.all()
    assert torch.equal(second.there, first.kept)
    assert not (second.kept & ~first.kept).any(), "a token came back"
    assert 0 < second.kept.sum() < first.kept.sum() < first.kept.numel()


def test_hidden_tokens_are_as_good_as_dropped():
    """Alone in its batch a picture keeps a number, and dropping to that number is the same network."""
    subject = vit("sdpa")
    plan = plan_for(subject)
    model, steps = hidden(subject, plan)
    for row in range(2):
        call = {"pixel_values": subject.inputs["pixel_values"][row : row + 1]}
        with torch.no_grad():
            found = model(**call).last_hidden_state[:, 0]
            counts = [int(step.kept.sum()) for step in steps]
            exact = Plan(
                choice={path: KeptCount(count=n) for path, n in zip(plan.choice, counts, strict=True)},
                arrays=plan.arrays,
            )
            short = PruneTokens(method="policy").rewrite(subject.copy(), exact)
            torch.testing.assert_close(short(**call).last_hidden_state[:, 0], found, atol=1e-5, rtol=0)
            assert (subject.model(**call).last_hidden_state[:, 0] - found).abs().max() > 1e-2


@pytest.mark.parametrize(("bias", "kept"), [(50.0, 1.0), (-50.0, 0.0)])
def test_a_policy_that_keeps_all_is_the_network_itself_and_one_that_keeps_none_the_class_token(bias, kept):
    subject = vit("sdpa")
    plan = plan_for(subject)
    arrays = {
        k: torch.full_like(v, bias) if k.endswith("bias") else torch.zeros_like(v) for k, v in plan.arrays.items()
    }
    model, steps = hidden(subject, Plan(choice=plan.choice, arrays=arrays))
    found, wanted = subject.output(model)[:, 0], subject.output(subject.model)[:, 0]
    assert [step.kept.float().mean() for step in steps] == [kept, kept]
    if kept:
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    else:
        assert found.isfinite().all()
        assert (found - wanted).abs().max() > 1e-2


def test_the_reward_pays_for_few_tokens_only_where_the_class_is_right():
    kept = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    right = torch.tensor([True, True, True, False])
    assert reward(kept, right, tau=1.5).tolist() == [0.0, 0.75, 1.0, -1.5]


def test_tokens_that_were_gone_before_have_no_say_in_the_probability():
    scores, there = torch.tensor([[0.9, 0.2, 0.3]]), torch.tensor([[True, True, False]])
    kept = torch.tensor([[True, False, False]])
    torch.testing.assert_close(log_probability(scores, kept, there).exp(), torch.tensor([0.9 * 0.8]))


def test_the_gradient_is_that_of_the_expected_reward(monkeypatch):
    """All 16 choices of a network of 4 tokens, each weighed by its probability, beside the expectation's gradient."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3)
    judge = policy.Interpreter(3, 2)
    step = HideStep(torch.nn.Identity(), None, judge, leading=0)  # type: ignore[arg-type]
    worth = torch.tensor([1.0, -0.4, 0.7, -0.9])

    def right() -> Tensor:
        """Whether the tokens that are left add up to something: as hard to foresee as a network's answer."""
        step.seen, step.there = x, torch.ones(1, 4, dtype=torch.bool)
        scores = judge(x)
        step.kept = torch.bernoulli(scores) > 0 if step.draws else scores > 0.5
        return (step.kept * worth).sum(dim=1) > 0.1

    choices = [torch.tensor([each]).bool() for each in itertools.product((0, 1), repeat=4)]
    scores = judge(x)
    chances = [torch.where(choice, scores, 1 - scores).prod() for choice in choices]
    worths = [reward(choice, (choice * worth).sum(dim=1) > 0.1, tau=2.0)[0] for choice in choices]
    assert len({each.item() for each in worths}) > 3
    expected = sum(chance * each for chance, each in zip(chances, worths, strict=True))
    wanted = torch.autograd.grad(expected, list(judge.parameters()))  # type: ignore[arg-type]

    found = [torch.zeros_like(weight) for weight in judge.parameters()]
    for choice, chance in zip(choices, chances, strict=True):
        monkeypatch.setattr(torch, "bernoulli", lambda scores, choice=choice: choice.float())
        gradients = torch.autograd.grad(policy_loss(step, right, tau=2.0), list(judge.parameters()))
        found = [sum_ + chance.item() * each for sum_, each in zip(found, gradients, strict=True)]
    for got, want in zip(found, wanted, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, -want, atol=1e-6, rtol=1e-4)
    assert not step.draws


def test_learning_finds_the_tokens_that_matter():
    """A network's class depends on tokens whose first feature is positive; the policy learns to keep those alone."""
    torch.manual_seed(0)
    judge = policy.Interpreter(4, 2)
    step = HideStep(torch.nn.Identity(), None, judge, leading=0)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.1)
    for _ in range(300):
        x = torch.randn(64, 6, 4)

        def right(x: Tensor = x) -> Tensor:
            step.seen, step.there = x, torch.ones(64, 6, dtype=torch.bool)
            scores = judge(x)
            step.kept = torch.bernoulli(scores) > 0 if step.draws else scores > 0.5
            return ~((x[..., 0] > 0) & ~step.kept).any(dim=1)

        loss = policy_loss(step, right, tau=1.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(500, 6, 4)
    agree = ((judge(x) > 0.5) == (x[..., 0] > 0)).float().mean()
    assert agree > 0.9


# Trained interpreters in a file


def test_trained_interpreters_come_from_a_file_and_need_no_calibration(tmp_path: Path):
    subject = vit("sdpa")
    fitted = plan_for(subject)
    trained = {name: -array for name, array in fitted.arrays.items()}
    save_file({**trained, "more": torch.zeros(1)}, tmp_path / "interpreters.safetensors")
    step = PruneTokens(method="policy", keep=0.5, borders=(0, 1), weights="interpreters.safetensors")
    plan = step.plan(subject.model, Context(folder=tmp_path))
    assert plan.arrays.keys() == trained.keys()
    assert all(torch.equal(plan.arrays[name], trained[name]) for name in trained)
    moved = step.moved(lambda path: f"../{path}", lambda model: model)
    assert moved.weights == "../interpreters.safetensors"
    assert PruneTokens().moved(lambda path: f"../{path}", lambda model: model).weights == ""


def test_counts_follow_the_trained_interpreters(tmp_path: Path):
    subject = vit("sdpa")
    plan = plan_for(subject)
    arrays = {k: torch.full_like(v, 9.0) if k.endswith("bias") else torch.zeros_like(v) for k, v in plan.arrays.items()}
    arrays["layers.1.interpreter.bias"] -= 18
    save_file(arrays, tmp_path / "all.safetensors")
    step = PruneTokens(method="policy", borders=(0, 1), quantile=1.0, weights="all.safetensors")
    found = step.plan(subject.model, Context(calibration=[subject.inputs], folder=tmp_path)).choice
    assert [kept.count for kept in found.values()] == [16, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "there is no 'layers.1.interpreter.weight' in it"),
        ({"weight": (4, 31), "bias": (4,)}, r"has \(4, 31\) and \(4,\); wanted \(heads, 32\) and \(heads,\)"),
        ({"weight": (4, 32), "bias": (3,)}, r"has \(4, 32\) and \(3,\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(arrays, message, tmp_path: Path):
    subject = vit("sdpa")
    named = {f"layers.1.interpreter.{name}": torch.zeros(shape) for name, shape in arrays.items()}
    save_file({**named, "else": torch.zeros(1)}, tmp_path / "odd.safetensors")
    step = PruneTokens(method="policy", borders=(1,), keep=0.5, weights="odd.safetensors")
    with pytest.raises(ToolchainError, match=message):
        step.plan(subject.model, Context(calibration=[subject.inputs], folder=tmp_path))


def test_weights_need_the_policy_and_their_file(tmp_path: Path):
    subject = vit("sdpa")
    with pytest.raises(ToolchainError, match="weights are of interpreters"):
        PruneTokens(weights="x.safetensors").plan(subject.model, Context())
    with pytest.raises(ToolchainError, match=r"the file of interpreters is not there: 'x\.safetensors'"):
        PruneTokens(method="policy", weights="x.safetensors").plan(subject.model, Context(folder=tmp_path))
