import copy

import pytest
import torch
from torch import nn

from enginewright import sources
from enginewright.calibration import tensors
from enginewright.models.blocks.llama import Attention, GatedMlp, Rotary
from enginewright.models.blocks.transformer import Mlp, SelfAttention
from enginewright.models.vision.fcaformer import ForwardCrossAttention
from enginewright.models.vision.fit import Reading
from enginewright.passes.contract import Context
from enginewright.passes.families.reference_blocks import attention, stack
from enginewright.passes.kernel.surgery import share
from enginewright.passes.pruning.prune_heads import PruneHeads
from enginewright.passes.pruning.prune_width import PruneWidth
from enginewright.passes.traits import (
    BlockStack,
    DeclaredAttention,
    DeclaredFeedForward,
    FeedForward,
    FixedAttention,
    FusedAttention,
    HeadedAttention,
    StreamBlock,
    layer_at,
)
from enginewright.targets.pytorch_engine import flat


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


def test_a_layer_of_the_same_names_that_declares_nothing_is_not_guessed_at():
    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.head_dim = 4, 2
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    assert attention(Alike()) is None
    assert isinstance(attention(type("Declared", (Alike, FusedAttention), {})()), HeadedAttention)


def test_heads_of_split_projections_go_and_the_others_say_what_they_said():
    torch.manual_seed(0)
    layer = Attention(8, 4).requires_grad_(False)
    angles = Rotary(2, longest=5)(torch.arange(5)[None])
    x = torch.randn(2, 5, 8)
    quiet = copy.deepcopy(layer)
    quiet.o_proj.weight[:, 2:4] = 0  # nothing reads head 1
    wanted = quiet(x, angles)
    assert (wanted - layer(x, angles)).abs().max() > 1e-3

    layer_at(nn.ModuleDict({"attn": layer}), "attn", HeadedAttention).keep_heads([0, 2, 3])

    assert layer.heads == 3
    torch.testing.assert_close(layer(x, angles), wanted)


def test_a_layer_that_is_left_out_whole_is_answered_for_by_one_tensor():
    model = nn.ModuleDict({"attn": Attention(8, 4)})
    layer_at(model, "attn", HeadedAttention).silence(model, "attn")
    assert torch.equal(model["attn"](torch.randn(2, 5, 8), (), causal=True), torch.zeros(2, 5, 8))


CROSSED = {
    "latents that read tokens": lambda: (Reading(8, 6, inner=8, heads=4), (torch.randn(2, 3, 8), torch.randn(2, 5, 6))),
    "with summaries": lambda: (
        ForwardCrossAttention(8, 4, 3, summaries=5),
        (torch.randn(2, 9, 8), torch.randn(2, 5, 8)),
    ),
    "without summaries": lambda: (ForwardCrossAttention(8, 4, 3, summaries=0), (torch.randn(2, 9, 8), None)),
}


@pytest.mark.parametrize("case", CROSSED)
def test_heads_of_attention_to_other_tokens_go_with_their_biases(case):
    torch.manual_seed(0)
    layer, call = CROSSED[case]()
    for parameter in layer.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape))
    quiet = copy.deepcopy(layer)
    quiet.proj.weight[:, 2:4] = 0  # nothing reads head 1
    wanted = quiet(*call)
    assert (wanted - layer(*call)).abs().max() > 1e-3
    found = layer_at(nn.ModuleDict({"attn": layer}), "attn", HeadedAttention)
    assert found.streams == (), "its values are of other tokens, so that none stands for its own"

    found.keep_heads([0, 2, 3])

    assert layer.heads == 3
    torch.testing.assert_close(layer(*call), wanted)


def test_a_bias_that_has_not_an_entry_for_each_head_is_an_obstacle():
    layer = ForwardCrossAttention(8, 4, 3, summaries=0)
    layer.position_bias = nn.Parameter(torch.zeros(3, 3, 3))
    assert attention(layer) == FixedAttention("its 'position_bias' has not an entry for each of its 4 heads")


@pytest.mark.parametrize(("model", "heads", "units"), [("fcaformer:tiny", 4, 6), ("fit:tiny", 12, 7)])
def test_every_attention_of_these_models_can_lose_heads_and_every_feed_forward_units(model, heads, units):
    loaded = sources.load(model)
    calls = tensors(loaded.batches(1, 3))
    context = Context(calibration=calls, example=calls[0])
    for step, kind, count in (
        (PruneHeads(share=0.5), DeclaredAttention, heads),
        (PruneWidth(share=0.5), DeclaredFeedForward, units),
    ):
        result = step.apply(share(loaded.module), context)
        assert set(result.changed) == {path for path, m in loaded.module.named_modules() if isinstance(m, kind)}
        assert (len(result.changed), result.plan.skipped) == (count, {})
        with torch.no_grad():
            assert all(each.isfinite().all() for each in flat(result.model(**calls[0])))


@pytest.mark.parametrize("make", [Mlp, GatedMlp])
def test_hidden_units_of_declared_feed_forwards_go_and_the_others_say_what_they_said(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(6, 5)).requires_grad_(False)
    quiet = copy.deepcopy(model)
    layer_at(quiet, "0", FeedForward).output.weight[:, 2] = 0
    x = torch.randn(3, 6)
    wanted = quiet(x)
    assert (wanted - model(x)).abs().max() > 1e-3

    layer_at(model, "0", FeedForward).keep_hidden([0, 1, 3, 4])

    torch.testing.assert_close(model(x), wanted)


def test_blocks_that_declare_nothing_are_no_stack_of_ours():
    undeclared = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    assert stack(undeclared) is None
    assert stack(nn.ModuleList([])) is None
    declared = nn.ModuleList([type("Ours", (nn.Linear, StreamBlock), {})(3, 3)])
    assert stack(declared) == BlockStack(declared)
    assert stack(nn.ModuleList([*declared, *undeclared])) is None
