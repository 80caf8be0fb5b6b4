"""Each loss by hand on tensors that one can do in the head."""

import math

import pytest
import torch

from enginewright.passes.recovery.losses import (
    attention_loss,
    feature_loss,
    log_map,
    output_loss,
    relation_loss,
    similarities,
)


def test_output_loss_is_relative_to_each_output() -> None:
    student = [torch.tensor([3.0, 4.0]), torch.tensor([[20.0]])]
    teacher = [torch.tensor([3.0, 2.0]), torch.tensor([[10.0]])]
    # (0 + 4) / 2 over (9 + 4) / 2, and 100 over 100.
    assert float(output_loss(student, teacher)) == pytest.approx((4 / 13 + 1) / 2)
    assert float(output_loss(teacher, teacher)) == 0


def test_features_are_weighted_by_the_output_loss_and_the_teachers_norms() -> None:
    student = [torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([8.0, 0.0], requires_grad=True)]
    teacher = [torch.tensor([0.0, 1.0]), torch.tensor([4.0, 0.0])]
    # Squared errors 0.5 and 8; norms 1 and 4 with mean 2.5; output loss 2: weights 2/0.5 * 2.5 and 2/8 * 2.5/4.
    weights = (10.0, 0.15625)
    loss = feature_loss(student, teacher, torch.tensor(2.0))
    assert float(loss.detach()) == pytest.approx((weights[0] * 0.5 + weights[1] * 8) / 2)
    loss.backward()
    # The weights carry no gradient: half the weight times the squared error's own, (s - t).
    assert student[0].grad.tolist() == pytest.approx([0, weights[0] * 1 / 2])
    assert student[1].grad.tolist() == pytest.approx([weights[1] * 4 / 2, 0])


def test_features_of_an_equal_student_give_zero_and_not_nan() -> None:
    same = [torch.ones(2, 3, requires_grad=True)]
    loss = feature_loss(same, [torch.ones(2, 3)], torch.tensor(0.0))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not same[0].grad.any()


def test_a_map_is_that_of_pytorchs_own_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind(0)
    mask = torch.rand(2, 4, 5, 5) > 0.3
    mask[..., 0] = True
    for kwargs, settings in (
        ({}, {"mask": None, "causal": False, "scale": None}),
        ({"is_causal": True}, {"mask": None, "causal": True, "scale": None}),
        ({"attn_mask": mask, "scale": 0.2}, {"mask": mask, "causal": False, "scale": 0.2}),
        ({"attn_mask": mask.float().log()}, {"mask": mask.float().log(), "causal": False, "scale": None}),
    ):
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, **kwargs)
        logs = log_map(query, key, settings["mask"], causal=settings["causal"], scale=settings["scale"])
        assert logs.isfinite().all()
        torch.testing.assert_close(logs.exp() @ value, exact, atol=1e-5, rtol=0)


def test_grouped_keys_are_repeated() -> None:
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    logs = log_map(query, key, None, causal=False, scale=None)
    twice = key[:, [0, 0, 1, 1]]
    torch.testing.assert_close(logs, log_map(query, twice, None, causal=False, scale=None))


def test_attention_loss_is_the_divergence_of_rows() -> None:
    teacher = torch.tensor([[[[0.5, 0.5]]]]).log()
    student = torch.tensor([[[[0.25, 0.75]]]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(attention_loss([student], [teacher])) == pytest.approx(by_hand)
    assert float(attention_loss([student, teacher], [teacher, teacher])) == pytest.approx(by_hand / 2)
    assert float(attention_loss([teacher], [teacher])) == 0


def test_maps_of_other_head_counts_are_compared_by_their_means() -> None:
    teacher = torch.tensor([[[[0.2, 0.8]], [[0.6, 0.4]]]]).log()  # two heads, mean (0.4, 0.6)
    student = torch.tensor([[[[0.4, 0.6]]]]).log()
    assert float(attention_loss([student], [teacher])) == pytest.approx(0, abs=1e-7)
    assert float(attention_loss([student.flip(-1)], [teacher])) > 0.05


def test_relations_are_cosines_and_need_no_common_width() -> None:
    tokens = torch.tensor([[[3.0, 0.0], [0.0, 5.0], [1.0, 1.0]]])
    half = 0.5**0.5
    expected = torch.tensor([[[1, 0, half], [0, 1, half], [half, half, 1]]])
    torch.testing.assert_close(similarities(tokens), expected)

    wide = torch.tensor([[[1.0, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 9]]])  # tokens 1 and 2 alike, the third apart
    # Differences: 1 twice (0 against 1), and half four times (against 0).
    assert float(relation_loss([tokens], [wide])) == pytest.approx((2 * 1 + 4 * 0.5) / 9)
    assert float(relation_loss([2 * tokens], [tokens])) == pytest.approx(0, abs=1e-12)
