"""ToMe for Stable Diffusion on the networks it was made for: U-Nets, whose largest resolution works on fewer tokens."""

import pytest
import torch

from enginewright.passes.contract import Context
from enginewright.passes.tokens.matching import cell_corners, match, rows
from enginewright.passes.tokens.merge_unmerge_tokens import MergeUnmergeTokens
from enginewright.passes.tokens.running import Step, TokenRun
from enginewright.passes.traits import TokenStack, layers_of
from tests.passes.conftest import Subject, randomise
from tests.passes.tokens.engines import agrees, exported, tripled
from tests.toolchain.sources import tiny_diffusers

CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
LARGEST = (
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
)


def unet(**settings):
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }
    return Subject(model=randomise(tiny_diffusers.unet(**CROSS, **settings)), inputs=inputs, paths=())


@pytest.mark.parametrize("settings", [{}, {"use_linear_projection": True}])
def test_blocks_taken_apart_are_the_blocks(settings):
    subject = unet(**settings)
    model = subject.copy()
    stacks = [stack for _, stack in layers_of(model, TokenStack)]
    assert len(stacks) == 7
    for stack in stacks:
        stack.replace_blocks(TokenRun([Step(block, stack.block) for block in stack.blocks], restore=True))
    torch.testing.assert_close(subject.output(model), subject.output(subject.model), atol=1e-5, rtol=1e-5)


def test_the_largest_resolution_takes_part_and_smaller_ones_when_asked():
    subject = unet()
    plan = MergeUnmergeTokens().plan(subject.model, Context(example=subject.inputs))
    assert tuple(plan.choice) == LARGEST
    assert plan.skipped["mid_block.attentions.0.transformer_blocks.0"] == (
        "its 16 tokens are those of a smaller resolution; the largest has 64"
    )
    assert len(MergeUnmergeTokens(downsample=2).plan(subject.model, Context(example=subject.inputs)).choice) == 7


def test_a_ratio_of_none_changes_nothing():
    subject = unet()
    result = MergeUnmergeTokens(ratio=0).apply(subject.copy(), Context(example=subject.inputs))
    assert result.changed == ()
    assert torch.equal(subject.output(result.model), subject.output(subject.model))


def test_attention_works_on_merged_tokens_and_the_text_on_all():
    subject = unet()
    result = MergeUnmergeTokens(ratio=0.5).apply(subject.copy(), Context(example=subject.inputs))
    assert result.after.macs < result.before.macs

    by_hand = subject.copy()
    for path in LARGEST:
        block = by_hand.get_submodule(path)

        def forward(hidden_states, block=block, attend=block.attn1.forward, **kwargs):
            matching = match(hidden_states, 32, leading=0, into=cell_corners(64, leading=0))
            block.attn1.forward = lambda y, **_: rows(attend(matching.merge(y, None, "onehot")[0]), matching.rows_of())
            return type(block).forward(block, hidden_states, **kwargs)

        block.forward = forward
    torch.testing.assert_close(subject.output(result.model), subject.output(by_hand), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(subject.output(result.model), subject.output(subject.model), atol=1e-3)


@pytest.mark.slow
def test_an_engine_agrees_at_every_batch(tmp_path):
    subject = unet()
    result = MergeUnmergeTokens(ratio=0.5).apply(subject.copy(), Context(example=subject.inputs))

    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = result.model

        def forward(self, sample, timestep, encoder_hidden_states):
            return self.inner(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    path = exported(First(), subject.inputs, tmp_path)
    agrees(First(), [subject.inputs, tripled(subject.inputs)], path)
