"""Feed-forwards and stacks of blocks, in every family."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.traits import BlockStack, FeedForward, layers_of, trait_of


def test_every_family_finds_its_feed_forwards_and_its_stack(subject):
    widths = [layer.hidden for _, layer in layers_of(subject.model, FeedForward)]
    stacks = [len(stack.blocks) for _, stack in layers_of(subject.model, BlockStack)]

    assert widths in ([128, 128], [48, 48])
    assert stacks == [2]


def test_removed_units_are_silenced_units(subject):
    """A unit whose column of the output is zero says nothing: without it the output stays."""
    silent, removed = subject.copy(), subject.copy()
    for _, layer in layers_of(silent, FeedForward):
        with torch.no_grad():
            layer.output.weight[:, layer.first_column + 5 : layer.first_column + 9] = 0
    for _, layer in list(layers_of(removed, FeedForward)):
        layer.keep_hidden([unit for unit in range(layer.hidden) if unit not in range(5, 9)])

    torch.testing.assert_close(subject.output(removed), subject.output(silent))
    assert not torch.allclose(subject.output(removed), subject.output(subject.model))
    assert [layer.hidden for _, layer in layers_of(removed, FeedForward)] in ([124, 124], [44, 44])


def test_the_whole_layer_standing_alone_takes_its_own_place(subject):
    model = subject.copy()
    held = [parameter.clone() for parameter in model.parameters()]
    for path, layer in list(layers_of(model, FeedForward)):
        part = layer.standalone(range(0, layer.hidden, 2))
        assert part(torch.randn(3, 32)).shape == (3, 32)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), held, strict=True))
        layer.replace_in(model, path, layer.standalone(range(layer.hidden)))

    assert torch.equal(subject.output(model), subject.output(subject.model))


def test_parts_of_a_layer_add_up_to_it(subject):
    for _, layer in layers_of(subject.model, FeedForward):
        half = layer.hidden // 2
        one, two = layer.standalone(range(half)), layer.standalone(range(half, layer.hidden))
        whole = layer.standalone(range(layer.hidden))
        x = torch.randn(7, 32)
        bias = layer.output.bias
        torch.testing.assert_close(one(x) + two(x) - bias, whole(x), atol=1e-5, rtol=1e-5)


def test_blocks_left_out_are_blocks_passed_by(dit):
    passed, left = dit.copy(), dit.copy()
    passed.blocks[0].forward = lambda x, c: x
    [(_, stack)] = layers_of(left, BlockStack)
    stack.keep_blocks([1])

    assert torch.equal(dit.output(left), dit.output(passed))
    assert not torch.equal(dit.output(left), dit.output(dit.model))


@pytest.mark.parametrize("activation", ["geglu", "swiglu", "gelu", "geglu-approximate"])
def test_gated_feed_forwards_of_diffusers(activation):
    from diffusers.models.attention import FeedForward as Layer

    layer = Layer(8, mult=2, activation_fn=activation).eval()
    silent = copy.deepcopy(layer)
    with torch.no_grad():
        silent.net[2].weight[:, 3] = 0
    found = trait_of(layer, FeedForward)
    assert (found.hidden, found.stacks) == (16, 2 if activation in ("geglu", "swiglu") else 1)
    found.keep_hidden([unit for unit in range(16) if unit != 3])
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), silent(x))


def test_gated_feed_forward_of_language_models():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    layer = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))
    silent = copy.deepcopy(layer)
    with torch.no_grad():
        silent.down_proj.weight[:, 3] = 0
    trait_of(layer, FeedForward).keep_hidden([unit for unit in range(16) if unit != 3])
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), silent(x))
    assert layer.intermediate_size == 15


def test_units_beside_an_attention_can_go_but_not_stand_alone():
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    block = FluxSingleTransformerBlock(8, 2, 4, mlp_ratio=2.0)
    layer = trait_of(block, FeedForward)
    assert (layer.hidden, layer.first_column) == (16, 8)
    with pytest.raises(ToolchainError, match="FluxSingleTransformerBlock shares a projection"):
        layer.standalone(range(4))
    with pytest.raises(ToolchainError, match="shares a projection"):
        layer.replace_in(block, "", nn.Identity())
    silent = copy.deepcopy(block)
    with torch.no_grad():
        silent.proj_out.weight[:, 8 + 2] = 0
    layer.keep_hidden([unit for unit in range(16) if unit != 2])
    inputs = torch.randn(1, 3, 8), torch.randn(1, 2, 8), torch.randn(1, 8)
    torch.testing.assert_close(block(*inputs), silent(*inputs))


def test_large_diffusion_transformers_on_the_meta_device():
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    with torch.device("meta"):
        flux, sd3 = FluxTransformer2DModel(guidance_embeds=True), SD3Transformer2DModel(num_layers=24)
    assert len(list(layers_of(flux, FeedForward))) == 19 * 2 + 38
    assert [len(stack.blocks) for _, stack in layers_of(flux, BlockStack)] == [19, 38]
    assert len(list(layers_of(sd3, FeedForward))) == 24 * 2 - 1
    [(_, stack)] = layers_of(sd3, BlockStack)
    assert stack.fixed == {23: "it ends the text stream"}
    with pytest.raises(AssertionError, match="must stay"):
        stack.keep_blocks([0, 1])


def test_what_only_looks_like_it_has_no_trait():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 4))

    assert trait_of(Half(), FeedForward) is None
    assert trait_of(nn.ModuleList([nn.Linear(2, 2)]), BlockStack) is None
    assert trait_of(nn.ModuleList(), BlockStack) is None
