import pytest
import torch
from torch import nn

from enginewright.passes.traits import FixedAttention, HeadedAttention, layer_at, layers_of, only, trait_of


def test_every_family_finds_its_layers_in_order(subject):
    found = list(layers_of(subject.model, HeadedAttention))

    assert tuple(path for path, _ in found) == subject.paths
    assert [(layer.heads, layer.head_dim, layer.output.in_features) for _, layer in found] == [(4, 8, 32)] * 2
    assert list(layers_of(subject.model, FixedAttention)) == []


def test_a_head_owns_its_columns_of_the_output_projection(subject):
    """Heads 1 to 3 silenced, only the columns of head 0 may matter."""
    model = subject.copy()
    for _, layer in layers_of(model, HeadedAttention):
        results = []
        layer.output.register_forward_pre_hook(lambda _, inputs, seen=results: seen.append(inputs[0]))
        silence_values(layer, heads=[1, 2, 3])
        subject.output(model)
        assert results[0].shape[-1] == 32
        assert results[0][..., :8].abs().max() > 0
        assert results[0][..., 8:].abs().max() == 0


def silence_values(layer, heads):
    """Zero the value projection of some heads: the last of the input projections, or its last third."""
    values = getattr(layer.core, layer.inputs[-1])
    start = values.out_features - layer.heads * layer.head_dim
    with torch.no_grad():
        for head in heads:
            rows = slice(start + head * layer.head_dim, start + (head + 1) * layer.head_dim)
            values.weight[rows] = 0
            if values.bias is not None:
                values.bias[rows] = 0


def test_a_plain_layer_has_no_trait():
    assert trait_of(nn.Linear(2, 2), HeadedAttention) is None
    assert trait_of(nn.Sequential(), FixedAttention) is None


def test_a_layer_that_lost_its_trait_is_our_fault():
    with pytest.raises(AssertionError, match="0 lost its trait HeadedAttention"):
        layer_at(nn.Sequential(nn.Linear(2, 2)), "0", HeadedAttention)


def test_only_lets_one_trait_through():
    fixed = FixedAttention("because")

    assert only(FixedAttention, lambda module: fixed)(nn.Identity()) is fixed
    assert only(HeadedAttention, lambda module: fixed)(nn.Identity()) is None
