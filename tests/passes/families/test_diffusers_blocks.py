import pytest
import torch
from diffusers.models.attention_processor import Attention

from enginewright.passes.families.diffusers_blocks import attention
from enginewright.passes.traits import FixedAttention, HeadedAttention


@pytest.mark.parametrize("bias", [True, False])
def test_counts_follow_the_heads_and_heads_can_go_twice(bias):
    layer = Attention(query_dim=32, heads=4, dim_head=8, bias=bias)
    for kept, heads in (([0, 1, 3], 3), ([0, 2], 2)):
        attention(layer).keep_heads(kept)
        assert (layer.heads, layer.inner_dim, layer.inner_kv_dim) == (heads, heads * 8, heads * 8)
        assert layer(torch.randn(2, 5, 32)).shape == (2, 5, 32)


def test_cross_attention_keeps_the_width_of_its_context():
    layer = Attention(query_dim=32, cross_attention_dim=12, heads=4, dim_head=8)

    attention(layer).keep_heads([1, 2])

    assert layer.to_k.weight.shape == layer.to_v.weight.shape == (16, 12)
    assert layer(torch.randn(2, 5, 32), torch.randn(2, 7, 12)).shape == (2, 5, 32)


def test_norms_of_the_input_stay_whole():
    layer = Attention(query_dim=32, heads=4, dim_head=8, norm_num_groups=4)

    attention(layer).keep_heads([1, 2])

    assert layer.group_norm.num_channels == 32
    assert layer(torch.randn(2, 5, 32)).shape == (2, 5, 32)


def fused():
    layer = Attention(query_dim=32, heads=4, dim_head=8)
    layer.fuse_projections()
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Attention(32, heads=4, dim_head=8, qk_norm="layer_norm"), "'norm_q' may depend on the heads"),
        (lambda: Attention(32, heads=4, dim_head=8, added_kv_proj_dim=16), "'add_k_proj' may depend on the heads"),
        (lambda: Attention(32, heads=4, kv_heads=2, dim_head=8), "4 heads of 8 do not fill its projections"),
        (lambda: Attention(32, heads=4, dim_head=8, processor=object()), "processor object may depend on the heads"),
        (lambda: Attention(32, heads=4, dim_head=8, pre_only=True), "lacks a key or an output projection"),
        (fused, "'to_qkv' may depend on the heads"),
    ],
    ids=["norm_q", "added_kv", "grouped", "processor", "pre_only", "fused"],
)
def test_a_variant_that_cannot_be_cut_says_why(layer, reason):
    answer = attention(layer())

    assert isinstance(answer, FixedAttention)
    assert reason in answer.reason


def test_a_plain_variant_is_not_refused():
    assert isinstance(attention(Attention(32, heads=4, dim_head=8)), HeadedAttention)
