import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, GPT2Model, LlamaConfig, ViTConfig
from transformers.models.bert.modeling_bert import BertAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.vit.modeling_vit import ViTAttention

from enginewright.passes.families.transformers_blocks import attention, attention_beside_output, feed_forward, stack
from enginewright.passes.traits import BlockStack, FixedAttention

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
SIZES = {"hidden_size": 32, "num_attention_heads": 4}


@IMPLEMENTATIONS
def test_vit_counts_follow_the_heads_and_heads_can_go_twice(implementation):
    layer = ViTAttention(ViTConfig(attn_implementation=implementation, **SIZES))
    for kept, heads in (([0, 1, 3], 3), ([0, 2], 2)):
        attention(layer).keep_heads(kept)
        assert (layer.num_attention_heads, layer.head_dim) == (heads, 8)
        assert layer(torch.randn(2, 5, 32))[0].shape == (2, 5, 32)
    assert layer.config.num_attention_heads == 4, "the config is shared with the other layers"


@IMPLEMENTATIONS
def test_bert_counts_follow_the_heads_and_heads_can_go_twice(implementation):
    layer = BertAttention(BertConfig(attn_implementation=implementation, **SIZES))
    for kept, heads in (([0, 1, 3], 3), ([0, 2], 2)):
        attention_beside_output(layer).keep_heads(kept)
        core = layer.self
        assert (core.num_attention_heads, core.attention_head_size, core.all_head_size) == (heads, 8, heads * 8)
        assert layer.output.dense.weight.shape == (32, heads * 8)
        assert layer(torch.randn(2, 5, 32))[0].shape == (2, 5, 32)


def test_bert_cross_attention_can_be_cut():
    layer = BertAttention(BertConfig(attn_implementation="sdpa", **SIZES), is_cross_attention=True)

    attention_beside_output(layer).keep_heads([3])

    context = torch.randn(2, 7, 32)
    assert layer(torch.randn(2, 5, 32), encoder_hidden_states=context)[0].shape == (2, 5, 32)


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_query_heads_that_share_a_key_go_together(keys):
    layer = LlamaAttention(
        LlamaConfig(num_key_value_heads=keys, attn_implementation="sdpa", **SIZES), layer_idx=0
    ).eval()
    found = attention(layer)
    assert (found.heads, found.head_dim) == (keys, 32 // keys), "a group of query heads counts as one head"
    if keys == 1:
        return
    x, table = torch.randn(2, 5, 32), (torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    masked = copy.deepcopy(layer)
    masked.o_proj.weight.data[:, found.head_dim : 2 * found.head_dim] = 0
    found.keep_heads([head for head in range(keys) if head != 1])
    assert layer.k_proj.out_features == 8 * (keys - 1)
    assert layer.q_proj.out_features == 32 - found.head_dim
    with torch.no_grad():
        torch.testing.assert_close(layer(x, table, None)[0], masked(x, table, None)[0], atol=1e-6, rtol=1e-5)


def test_a_layer_whose_projection_writes_more_than_its_heads_is_refused():
    layer = LlamaAttention(LlamaConfig(num_key_value_heads=2, **SIZES), layer_idx=0)
    layer.q_proj = nn.Linear(32, 64)  # a gate beside each query, as Qwen3-Next has
    assert isinstance(attention(layer), FixedAttention)


def test_a_position_bias_for_each_head_is_refused_by_name():
    layer = BertAttention(BertConfig(**SIZES))
    layer.self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))

    answer = attention_beside_output(layer)

    assert answer == FixedAttention("its part 'relative_position_bias_table' may depend on the heads")


@pytest.mark.parametrize("name", ["act", "activation_fn"])
def test_two_layers_around_an_activation_are_a_feed_forward_and_without_one_they_are_none(name):
    class TwoLayers(nn.Module):
        """``VitDetMlp`` calls its activation ``act``, ``ViTMLP`` ``activation_fn``."""

        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    layer = TwoLayers()
    assert feed_forward(layer) is None
    setattr(layer, name, nn.GELU())
    found = feed_forward(layer)
    assert found.hidden == 6
    assert (found.inputs, found.output) == ((layer.fc1,), layer.fc2)


def test_a_list_of_gpt2_blocks_is_a_stack_and_a_list_of_their_norms_is_none():
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=20)
    blocks = GPT2Model(config).h
    assert stack(blocks) == BlockStack(blocks)
    assert stack(nn.ModuleList(block.ln_1 for block in blocks)) is None
