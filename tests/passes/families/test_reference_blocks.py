import torch
from torch import nn

from enginewright.models.blocks.transformer import SelfAttention
from enginewright.passes.families.reference_blocks import attention
from enginewright.passes.traits import FixedAttention, HeadedAttention, layer_at


def test_counts_follow_the_heads_and_heads_can_go_twice(dit):
    model = dit.copy()
    for kept, heads in (([0, 1, 3], 3), ([0, 2], 2)):
        layer_at(model, "blocks.0.attn", HeadedAttention).keep_heads(kept)
        layer = model.blocks[0].attn
        assert (layer.heads, layer.head_dim) == (heads, 8)
        assert layer.qkv.weight.shape == (3 * heads * 8, 32)
        assert layer.proj.weight.shape == (32, heads * 8)
    original = dit.model.blocks[0].attn.proj.weight.unflatten(1, (4, 8))
    assert torch.equal(layer.proj.weight.unflatten(1, (2, 8)), original[:, [0, 3]])
    assert dit.output(model).isfinite().all()


def test_a_part_that_may_depend_on_the_heads_is_refused_by_name():
    layer = SelfAttention(8, 4)
    layer.register_parameter("head_bias", nn.Parameter(torch.zeros(4)))

    assert attention(layer) == FixedAttention("its part 'head_bias' may depend on the heads")


def test_inert_parts_are_no_obstacle():
    layer = SelfAttention(8, 4)
    layer.drop = nn.Dropout(0.1)

    assert isinstance(attention(layer), HeadedAttention)


def test_a_projection_of_another_kind_is_refused():
    layer = SelfAttention(8, 4)
    layer.proj = nn.Sequential(layer.proj)

    assert attention(layer) == FixedAttention("its 'proj' is a Sequential, not a plain Linear")


def test_projections_that_do_not_fit_the_heads_are_refused():
    layer = SelfAttention(8, 4)
    layer.heads = 3

    answer = attention(layer)

    assert isinstance(answer, FixedAttention)
    assert answer.reason == "its 3 heads of 2 do not fill its projections: {'qkv': 24}"
