import copy

import pytest
import torch

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.tokens.matching import rows
from enginewright.passes.tokens.merge_unmerge_tokens import MergeUnmergeTokens, ShrunkStep, number_merged
from enginewright.passes.traits import PatchNetwork, TokenStack, layers_of
from tests.passes.conftest import bert, vit
from tests.passes.tokens.engines import agrees, builds, exported, tripled


def authors(metric, ratio):
    """Matching in a square picture with the receivers at the top left, as the authors wrote it; merge, unmerge."""
    batch, tokens, _ = metric.shape
    side = int(tokens**0.5)
    corner = torch.zeros(side, side, dtype=torch.bool)
    corner[::2, ::2] = True
    b_idx, a_idx = corner.flatten().nonzero()[:, 0], (~corner.flatten()).nonzero()[:, 0]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, a_idx] @ unit[:, b_idx].transpose(1, 2)
    r = min(len(a_idx), int(tokens * ratio))
    best, node = scores.max(dim=-1)
    edge = best.argsort(dim=-1, descending=True)
    keep, go = edge[:, r:], edge[:, :r]
    into = node.gather(1, go)

    def merge(x):
        first, second = x[:, a_idx], x[:, b_idx]
        second = second.scatter_reduce(1, into[..., None].expand(-1, -1, x.shape[-1]), rows(first, go), reduce="mean")
        return torch.cat([rows(first, keep), second], dim=1)

    def unmerge(y):
        out = torch.zeros(batch, tokens, y.shape[-1])
        kept, second = y[:, : len(a_idx) - r], y[:, len(a_idx) - r :]
        for i in range(batch):
            out[i, b_idx] = second[i]
            out[i, a_idx[keep[i]]] = kept[i]
            out[i, a_idx[go[i]]] = second[i, into[i]]
        return out

    return merge, unmerge


@pytest.mark.parametrize("form", ["onehot", "scatter"])
@pytest.mark.parametrize("over", ["attention", "feed_forward", "both"])
def test_a_block_is_the_authors(dit, over, form):
    block = dit.model.blocks[0]
    result = MergeUnmergeTokens(ratio=0.4, over=over, form=form).apply(dit.copy(), Context())
    (run,) = result.model.blocks
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    merge, unmerge = authors(x, 0.4)
    plain = lambda y: y  # noqa: E731
    wrap = {"attention": (merge, unmerge, plain, plain), "feed_forward": (plain, plain, merge, unmerge)}
    m1, u1, m2, u2 = wrap.get(over, (merge, unmerge, merge, unmerge))
    with torch.no_grad():
        parts = [p[:, None] for p in block.adaLN_modulation(c).chunk(6, dim=1)]
        y = x + parts[2] * u1(block.attn(m1(block.norm1(x) * (1 + parts[1]) + parts[0])))
        wanted = y + parts[5] * u2(block.mlp(m2(block.norm2(y) * (1 + parts[4]) + parts[3])))
        run.steps = run.steps[:1]
        found = run(x, c)
        plainly = block(x, c)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (found - plainly).abs().max() > 1e-3


def test_identical_tokens_merge_and_come_back_exactly(dit):
    """Each cell of 2 x 2 holds one token four times; a feed-forward on one of them is a feed-forward on all."""
    cells = torch.randn(2, 2, 2, 32)
    x = cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)  # (2, 16, 32)
    c = torch.randn(2, 32)
    with torch.no_grad():
        wanted = dit.model.blocks[1](dit.model.blocks[0](x, c), c)
        for over in ("feed_forward", "both"):
            (run,) = MergeUnmergeTokens(ratio=0.75, over=over).apply(dit.copy(), Context()).model.blocks
            torch.testing.assert_close(run(x, c), wanted, atol=2e-6, rtol=1e-5)


def test_a_ratio_of_0_changes_nothing_and_says_so(subject):
    result = MergeUnmergeTokens(ratio=0).apply(subject.copy(), Context(example=subject.inputs))
    assert result.changed == ()
    assert result.before == result.after
    assert len(result.plan.skipped) == 2
    assert torch.equal(subject.output(result.model), subject.output(subject.model))


def test_products_on_merged_tokens_are_saved_and_no_others(dit):
    """8 of 16 tokens go: their projections and attention; against that the scores of matching and the 0/1 matrix."""
    result = MergeUnmergeTokens(ratio=0.5).apply(dit.copy(), Context(example=dit.inputs))
    saved = 8 * 32 * 4 * 32 + 2 * (16 * 16 - 8 * 8) * 32
    matching = 12 * 4 * 32 + 8 * 8 * (32 + 1)
    assert result.before.macs - result.after.macs == 2 * 2 * (saved - matching)


def test_a_class_token_takes_no_part():
    subject = vit("sdpa")
    result = MergeUnmergeTokens(ratio=0.7, over="both").apply(subject.copy(), Context(example=subject.inputs))
    (run,) = result.model.layers
    steps = [step for step in run.steps if isinstance(step, ShrunkStep)]
    assert [step.leading for step in steps] == [1, 1]
    assert number_merged(0.7, 17, 1) == 11
    assert number_merged(0.75, 17, 1) == 12
    assert (subject.output(result.model) - subject.output(subject.model)).abs().max() > 1e-2


def test_an_excluded_block_is_whole(dit):
    result = MergeUnmergeTokens(exclude=("blocks.0",)).apply(dit.copy(), Context())
    assert result.changed == ("blocks.1",)
    assert result.plan.skipped == {"blocks.0": "excluded by 'blocks.0'"}
    (run,) = result.model.blocks
    assert [type(step).__name__ for step in run.steps] == ["Step", "ShrunkStep"]


def test_what_is_no_square_picture_is_left_alone(dit):
    plan = MergeUnmergeTokens().plan(bert("sdpa").model, Context())
    assert set(plan.skipped.values()) == {"its tokens are not the patches of a square picture"}
    assert not plan.choice
    model = copy.deepcopy(dit.model)
    inputs = {"x": torch.randn(2, 15, 32), "c": torch.randn(2, 32)}

    class Part(torch.nn.Module, PatchNetwork):
        def __init__(self):
            super().__init__()
            self.blocks = model.blocks

        def forward(self, x, c):
            for block in self.blocks:
                x = block(x, c)
            return x

    plan = MergeUnmergeTokens().plan(Part(), Context(example=inputs))
    assert set(plan.skipped.values()) == {"its 15 tokens are not those of a square picture"}
    assert next(layers_of(Part(), TokenStack))


def test_what_a_user_can_mend(dit):
    with pytest.raises(ToolchainError, match=r"ratio is 0\.8"):
        MergeUnmergeTokens(ratio=0.8)
    with pytest.raises(ToolchainError, match="exclude 'blok' matches no block"):
        MergeUnmergeTokens(exclude=("blok",)).plan(dit.model, Context())


def test_engines_agree_at_every_batch(dit, tmp_path):
    model = MergeUnmergeTokens(over="both").apply(dit.copy(), Context()).model
    path = exported(model, dit.inputs, tmp_path)
    agrees(model, [dit.inputs, tripled(dit.inputs)], path)
    builds(path, dit.inputs, tmp_path)


def test_gathering_is_what_indexing_does():
    x, index = torch.randn(3, 5, 4), torch.randint(0, 5, (3, 7))
    assert torch.equal(rows(x, index), x.gather(1, index[..., None].expand(-1, -1, 4)))
