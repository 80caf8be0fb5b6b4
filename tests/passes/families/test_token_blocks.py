import copy

import pytest
import torch
from torch import nn

from enginewright.passes.contract import Context
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8
from enginewright.passes.tokens.merge_tokens import MergeTokens
from enginewright.passes.tokens.running import Step, TokenRun
from enginewright.passes.traits import TokenStack, layers_of


def stack_of(model):
    ((path, stack),) = layers_of(model, TokenStack)
    return path, stack


def run(model, *, proportional=False):
    """The model with its blocks taken apart, and no token the less."""
    _, stack = stack_of(model)
    stack.replace_blocks(
        TokenRun([Step(b, stack.block, proportional=proportional) for b in stack.blocks], restore=True)
    )
    return model


def test_a_block_taken_apart_is_the_block(subject):
    before = subject.output(subject.model)

    model = run(subject.copy(), proportional=True)

    assert not list(layers_of(model, TokenStack)), "a run is not taken apart again"
    torch.testing.assert_close(subject.output(model), before, atol=1e-5, rtol=0)
    weights = [t for t in model.parameters() if t.ndim > 1]
    assert sum(t.numel() for t in model.parameters()) == sum(t.numel() for t in subject.model.parameters())
    with torch.no_grad():
        weights[-4].mul_(2)
    assert (subject.output(model) - before).abs().max() > 1e-3  # the run reads the block's own weights


@pytest.mark.parametrize(
    ("name", "path", "leading", "reads_all", "padded"),
    [
        ("reference_dit", "blocks", 0, True, False),
        ("diffusers_dit_sdpa", "transformer_blocks", 0, True, False),
        ("vit_sdpa", "layers", 1, False, False),
        ("bert_sdpa", "encoder.layer", 1, False, True),
    ],
)
def test_what_a_stack_says_of_itself(name, path, leading, reads_all, padded):
    from tests.passes.conftest import SUBJECTS

    owner, stack = stack_of(SUBJECTS[name]().model)

    assert owner == ""
    assert (stack.path, stack.leading, stack.reads_all, stack.padded) == (path, leading, reads_all, padded)
    assert stack.square != padded


def test_a_distillation_token_leads_too():
    from transformers import DeiTConfig, DeiTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = DeiTModel(DeiTConfig(image_size=8, patch_size=2, **sizes)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        assert stack_of(model)[1].leading == 2
        torch.testing.assert_close(run(model)(pixels).last_hidden_state, before, atol=1e-5, rtol=0)


def test_the_mask_of_padding_reaches_attention():
    from tests.passes.conftest import bert

    for kind in ("sdpa", "eager"):
        subject = bert(kind)
        model = run(subject.copy())
        seen = subject.output(model)
        subject.inputs["input_ids"][1, 5:] = 7
        torch.testing.assert_close(subject.output(model)[1, :5], seen[1, :5], atol=1e-5, rtol=0)
        subject.inputs["attention_mask"][:] = 1
        assert (subject.output(model)[1, :5] - seen[1, :5]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["reference_dit", "vit_sdpa", "bert_sdpa", "diffusers_dit_sdpa"])
def test_a_block_with_a_part_that_is_not_known_is_not_taken_apart(name):
    from tests.passes.conftest import SUBJECTS

    model = SUBJECTS[name]().model
    _, stack = stack_of(model)
    if name.startswith("diffusers"):
        stack.blocks[0].attn1.norm_q = nn.LayerNorm(8)
    else:
        stack.blocks[0].gate = nn.Parameter(torch.ones(1))

    plan = MergeTokens().plan(model, Context())

    assert not plan.choice
    assert plan.skipped == {"": f"no family knows how the blocks of a {type(model).__name__} run on fewer tokens"}


def test_layers_within_a_run_can_still_be_quantized_and_shared(dit):
    model = MergeTokens(r=2).apply(dit.copy(), Context()).model
    twin = copy.deepcopy(model)

    result = QuantizeInt8(smallest=0).apply(model, Context(calibration=[dit.inputs]))

    assert "blocks.0.steps.1.block.mlp.fc2" in result.changed
    error = (dit.output(result.model) - dit.output(twin)).abs().max()
    assert 0 < error < 0.5
