from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from enginewright.passes.kernel.surgery import put_at
from enginewright.passes.pruning.hard_attention import HardAttention, hard_attention, largest
from tests.engines import exported, in_onnxruntime
from tests.passes.conftest import SUBJECTS


def hardened(subject, keep, *, on=True):
    model = subject.copy()
    for path in subject.paths:
        put_at(model, path, HardAttention(model.get_submodule(path), keep, on=on))
    return model


def test_as_many_as_there_are_keys_or_more_is_dense_attention(subject):
    dense = subject.output(subject.model)
    torch.testing.assert_close(subject.output(hardened(subject, 1000)), dense, atol=1e-5, rtol=1e-5)
    assert torch.equal(subject.output(hardened(subject, 2, on=False)), dense)
    assert (subject.output(hardened(subject, 2)) - dense).abs().max() > 0.05


def test_fused_and_plain_attention_are_hard_alike():
    for family in ("bert", "vit", "diffusers_dit"):
        outputs = []
        for form in ("sdpa", "eager"):
            torch.manual_seed(0)
            subject = SUBJECTS[f"{family}_{form}"]()
            outputs.append(subject.output(hardened(subject, 3)))
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_the_largest_stay_as_they_are():
    p = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.5, 0.0]])
    assert torch.equal(
        largest(p, 2), torch.tensor([[0.4, 0, 0.3, 0], [0.25, 0.25, 0.5, 0]])
    )  # equal ones stay together


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_without_a_limit_it_is_the_fused_attention(mask):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    options = {"scale": 0.3, "enable_gqa": True, "is_causal": mask == "causal"}
    if mask == "bool":
        options["attn_mask"] = torch.rand(5, 5).fill_diagonal_(1) > 0.5
    if mask == "float":
        options["attn_mask"] = torch.randn(5, 5)
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(hard_attention(q, k, v, **options, keep=5), wanted)


@pytest.mark.parametrize("name", ["reference_dit", "diffusers_dit_eager", "bert_sdpa"])
def test_it_exports(name, tmp_path):
    subject = SUBJECTS[name]()
    model = hardened(subject, 3)
    count = 1 if subject.inputs.keys() & {"x", "hidden_states"} else 2
    path = exported(model, subject.inputs, tmp_path, [f"y{i}" for i in range(count)])
    torch.testing.assert_close(in_onnxruntime(path, subject.inputs), subject.output(model), atol=1e-4, rtol=0)
