"""Calls, learning rate, and the stop of alignment."""

import copy

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.recovery.devices import Devices
from enginewright.passes.recovery.distill import Distill
from enginewright.passes.recovery.feeding import AT_ONCE, Cycled, Generated, joined
from enginewright.passes.recovery.guides import Teacher, guide
from enginewright.passes.recovery.training import Training, cosine, schedule
from tests.passes.conftest import SUBJECTS


def training(subject, **settings):
    """A run on a student that was pushed off its teacher."""
    step = Distill(**{"steps": 8, "batch": 1, "lr": 1e-3, "features": 1, "attention": 1, **settings})
    student = subject.copy()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    own = Teacher(model="", output=step.output, features=step.features, attention=step.attention)
    return Training(
        student=student,
        guides=[guide(own, subject.model, student, subject.inputs, (0, 1))],
        weights={name: weight for name, weight in student.named_parameters() if weight.requires_grad},
        settings=step,
        calls=Cycled([subject.inputs], 1),
        devices=Devices("cpu"),
    )


def test_alignment_stops_at_its_share_of_the_steps_and_the_output_loss_alone_stays(dit) -> None:
    run = training(dit, stop="share", stop_share=0.5)
    whole, stopped = [], []
    for _ in range(8):
        base, align = run.losses(dit.inputs, align=True)
        expected = base + align if run.state.step < 4 else base
        run.stop_when_due()
        loss, gradients = run.gradients()
        assert loss == float(expected.detach())
        exact = torch.autograd.grad(run.losses(dit.inputs, align=False)[0], run.parameters, materialize_grads=True)
        same = all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))
        (stopped if same else whole).append(run.state.step)
        run.step()
        run.state.step += 1
    assert (whole, stopped) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert run.state.stopped == 4


def test_alignment_stops_when_the_gradients_part(dit) -> None:
    run = training(dit, stop="angle", stop_cosine=0.2)
    run.state.cosines = [0.9, 0.3, 0.3]
    run.stop_when_due()
    assert run.state.stopped is None

    run.state.cosines.append(-0.1)
    run.stop_when_due()
    assert run.state.stopped == 0


def test_the_angle_is_that_of_the_two_gradients_and_looking_changes_nothing(dit) -> None:
    run = training(dit, stop="angle")
    base, align = run.losses(dit.inputs, align=True)
    both = [
        torch.autograd.grad(loss, run.parameters, retain_graph=True, materialize_grads=True) for loss in (base, align)
    ]
    loss, gradients = run.gradients()
    assert run.state.cosines == [pytest.approx(cosine(*both))]
    assert 0 < abs(run.state.cosines[0]) < 1
    assert loss == pytest.approx(float((base + align).detach()))
    for gradient, first, second in zip(gradients, *both, strict=True):
        torch.testing.assert_close(gradient, first + second, atol=1e-6, rtol=1e-4)


def test_a_cosine_by_hand() -> None:
    first, second = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([0.0]), torch.tensor([2.0])]
    assert cosine(first, second) == pytest.approx(0.8)
    assert cosine(first, [torch.zeros(1), torch.zeros(1)]) == 0


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule(step, 20, 0.2) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert schedule(0, 1, 0) == 1


def test_a_blind_spot_in_the_balance_of_experts_is_trained_away() -> None:
    class Experts(nn.Module):
        """Says something, and that its weight should be 1."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.balance_loss = torch.zeros(())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.balance_loss = (self.weight - 1).square().sum()
            return x

    student, calls = Experts(), [{"x": torch.ones(2)}]
    context = Context(calibration=calls, original=copy.deepcopy(student))
    plan = Distill(steps=60, lr=0.1, balance=1).plan(student, context)
    torch.testing.assert_close(plan.arrays["weight"], torch.ones(3), atol=0.1, rtol=0)

    without = Distill(steps=3, lr=0.1, balance=0).plan(student, context)
    assert not without.choice


def test_calls_are_joined_where_every_input_has_its_rows() -> None:
    calls = [{"x": torch.full((2, 3), float(i)), "t": torch.full((2,), i)} for i in range(3)]
    (one,) = joined(calls)
    assert one["x"].shape == (6, 3)
    assert one["t"].tolist() == [0, 0, 1, 1, 2, 2]

    longer = {"x": torch.zeros(2, 4), "t": torch.zeros(2, dtype=torch.long)}
    assert [call["x"].shape for call in joined([*calls, longer])] == [(6, 3), (2, 4)]

    shared = [{"x": torch.zeros(2, 3), "table": torch.zeros(5)} for _ in range(2)]
    assert [call["x"].shape for call in joined(shared)] == [(2, 3), (2, 3)]


@pytest.fixture
def bert(calm):
    return SUBJECTS["bert_sdpa"]()


def test_gradients_of_calls_that_cannot_be_joined_are_averaged(bert) -> None:
    run = training(bert, attention=0, features=0)
    shorter = {name: tensor[:, :4] for name, tensor in bert.inputs.items()}
    alone = []
    for call in (bert.inputs, shorter):
        run.calls = Cycled([call], 1)
        alone.append(run.gradients())
    run.calls = Cycled([bert.inputs, shorter], 2)
    loss, gradients = run.gradients()
    assert loss == pytest.approx((alone[0][0] + alone[1][0]) / 2)
    for gradient, first, second in zip(gradients, alone[0][1], alone[1][1], strict=True):
        torch.testing.assert_close(gradient, (first + second) / 2, atol=1e-6, rtol=1e-4)


def test_given_calls_come_in_turn_and_again() -> None:
    calls = [{"x": torch.tensor([i])} for i in range(3)]
    feed = Cycled(calls, 2)
    assert [[int(call["x"]) for call in feed(step)] for step in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_drawn_calls_never_repeat_and_depend_on_the_step_alone() -> None:
    asked = []

    def draw(count, seed):
        asked.append((count, seed))
        return [{"x": torch.tensor([seed + i])} for i in range(count)]

    feed = Generated(draw, 2)
    met = [int(call["x"]) for step in range(2 * AT_ONCE) for call in feed(step)]
    assert met == list(range(4 * AT_ONCE))
    assert asked == [(2 * AT_ONCE, 0), (2 * AT_ONCE, 2 * AT_ONCE)]
    assert [int(call["x"]) for call in Generated(draw, 2)(AT_ONCE + 3)] == [2 * AT_ONCE + 6, 2 * AT_ONCE + 7]


def test_a_loss_that_is_no_number_ends_the_run(dit) -> None:
    run = training(dit, lr=1)
    run.parameters[0].data.fill_(float("nan"))
    with pytest.raises(ToolchainError, match="the loss of step 1 is nan") as caught:
        run.run(Context(), folder=None, made_for="")
    assert "lr = 0.3" in caught.value.help
