import copy

import pytest
import torch

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.tokens.merge_tokens import MergedTokens, MergeTokens
from enginewright.passes.tokens.running import Step, TokenRun, Tokens
from enginewright.passes.traits import TokenStack, layers_of
from tests.passes.conftest import bert, vit
from tests.passes.tokens.engines import agrees, builds, exported, tripled


def sizes_along(model, inputs):
    """Tokens' sizes after each block."""
    found = []
    (run,) = (m for m in model.modules() if isinstance(m, TokenRun))
    hooks = [s.register_forward_hook(lambda _, given, __: found.append(given[0].size)) for s in run.steps]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def by_hand(subject, r):
    """ViT with merging, written out: the authors' block, with attention spelled as a softmax."""
    from tests.passes.tokens.test_matching import official

    model = subject.model
    with torch.no_grad():
        x = model.embeddings(subject.inputs["pixel_values"])
        size = torch.ones_like(x[..., :1])
        for layer in model.layers:
            y, part = layer.layernorm_before(x), layer.attention
            q, k, v = (f(y).unflatten(-1, (4, 8)).transpose(1, 2) for f in (part.q_proj, part.k_proj, part.v_proj))
            scores = q @ k.transpose(-1, -2) * 8**-0.5 + size.log()[:, None, None, :, 0]
            x = x + part.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x, size = official(k.mean(1), r, class_token=True)(x, size)
            x = x + layer.mlp(layer.layernorm_after(x))
        return model.layernorm(x)


@pytest.mark.parametrize("form", ["onehot", "scatter"])
def test_a_merged_vit_is_the_authors_block_by_block(form):
    subject = vit("sdpa")

    result = MergeTokens(r=3, form=form, restore=False).apply(subject.copy(), Context())

    wanted = by_hand(subject, 3)
    assert wanted.shape == (2, 11, 32)
    torch.testing.assert_close(subject.output(result.model), wanted, atol=1e-5, rtol=0)


def test_sizes_always_sum_to_all_tokens():
    subject = vit("sdpa")
    model = MergeTokens(r=4).apply(subject.copy(), Context()).model
    sizes = sizes_along(model, subject.inputs)
    assert [size.shape[1] for size in sizes] == [13, 9]
    for size in sizes:
        torch.testing.assert_close(size.sum(1), torch.full((2,), 17.0))


def test_r_0_changes_nothing_and_says_so(subject):
    before = subject.output(subject.model)

    result = MergeTokens(r=0).apply(subject.copy(), Context(example=subject.inputs))

    assert result.changed == ()
    assert result.before == result.after
    assert len(result.plan.skipped) == 2
    assert torch.equal(subject.output(result.model), before)


def test_the_forms_agree(dit):
    outputs = [
        dit.output(MergeTokens(r=3, form=form).apply(dit.copy(), Context()).model) for form in ("onehot", "scatter")
    ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    assert (outputs[0] - dit.output(dit.model)).abs().max() > 0.01


def test_identical_tokens_merge_without_a_trace_because_attention_weighs_them():
    """Four tokens twice and four once: merged, the twins must weigh double, and then nothing has changed."""
    subject = vit("sdpa")
    _, stack = next(layers_of(subject.model, TokenStack))
    twins, others = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    x = torch.cat([twins.repeat_interleave(2, dim=1), others], dim=1)
    outputs = {}
    with torch.no_grad():
        wanted = TokenRun([Step(b, stack.block) for b in stack.blocks], restore=True)(x)
        for weighs in (True, False):
            (run,) = (
                MergeTokens(r=4, proportional=weighs, exclude=("*.1",)).apply(subject.copy(), Context()).model.layers
            )
            run.steps[0].leading = 0
            outputs[weighs] = run(x)
    torch.testing.assert_close(outputs[True], wanted, atol=1e-5, rtol=0)
    assert (outputs[False] - wanted).abs().max() > 1e-2


def test_all_tokens_come_back_in_their_places(dit):
    """Merged tokens share a state; those that were never merged keep their own."""
    model = MergeTokens(r=2).apply(dit.copy(), Context()).model
    (run,) = model.blocks
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    with torch.no_grad():
        full = run(x, c)
        run.restore = False
        short = run(x, c)
    assert full.shape == (2, 16, 32)
    assert short.shape == (2, 12, 32)
    for image in range(2):
        assert {tuple(t) for t in full[image].tolist()} == {tuple(t) for t in short[image].tolist()}


def test_more_merging_costs_less_and_moves_further():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=16, patch_size=2, **sizes), add_pooling_layer=False).eval()
    inputs = {"pixel_values": torch.randn(4, 3, 16, 16)}
    macs, moved = [], []
    with torch.no_grad():
        before = model(**inputs)[0][:, 0]
        for r in (1, 4, 8, 14):
            step = MergeTokens(r=r)
            result = step.apply(copy.deepcopy(model), Context(example=inputs))
            macs.append(result.after.macs)
            moved.append((result.model(**inputs)[0][:, 0] - before).norm().item())
    assert macs == sorted(macs, reverse=True)
    assert moved == sorted(moved)


def test_a_schedule_falls_to_none():
    assert MergeTokens(r=8, schedule="linear").amounts(5) == [16, 12, 8, 4, 0]
    assert MergeTokens(r=8).amounts(3) == [8, 8, 8]
    assert MergeTokens(r=3, schedule="linear").amounts(1) == [6]
    subject = vit("sdpa")
    plan = MergeTokens(r=2, schedule="linear").plan(subject.model, Context(example=subject.inputs))
    assert plan.choice == {"layers.0": MergedTokens(merge=4)}
    assert plan.skipped == {"layers.1": "r is 0 here"}


def test_r_is_clipped_to_half_of_what_is_there():
    subject = vit("sdpa")
    result = MergeTokens(r=50).apply(subject.copy(), Context(example=subject.inputs))
    assert result.plan.choice == {"layers.0": MergedTokens(merge=8), "layers.1": MergedTokens(merge=4)}
    assert result.plan.facts.as_json() == {"tokens": {"layers": 17}}
    assert [s.shape[1] for s in sizes_along(result.model, subject.inputs)] == [9, 5]


def test_an_excluded_block_still_weighs():
    subject = vit("sdpa")
    result = MergeTokens(r=3, exclude=("*.1",)).apply(subject.copy(), Context())
    assert result.plan.skipped == {"layers.1": "excluded by '*.1'"}
    assert [s.shape[1] for s in sizes_along(result.model, subject.inputs)] == [14, 14]
    result.model.layers[0].steps[1].proportional = False
    weighed = MergeTokens(r=3, exclude=("*.1",)).apply(subject.copy(), Context()).model
    assert (subject.output(result.model) - subject.output(weighed)).abs().max() > 1e-4


def test_padding_is_never_merged():
    subject = bert("sdpa")
    plan = MergeTokens().plan(subject.model, Context())
    assert not plan.choice
    assert all("padding" in reason for reason in plan.skipped.values())


def test_what_a_user_can_mend(dit):
    with pytest.raises(ToolchainError, match="reads every token at its end") as caught:
        MergeTokens(restore=False).plan(dit.model, Context())
    assert caught.value.where == "blocks"
    with pytest.raises(ToolchainError, match="exclude 'blok' matches no block"):
        MergeTokens(exclude=("blok",)).plan(dit.model, Context())
    with pytest.raises(ToolchainError, match="r is -1"):
        MergeTokens(r=-1)


def test_dropped_and_moved_tokens_are_found_again():
    x = torch.arange(12.0).view(1, 6, 2)
    tokens = Tokens(x, torch.arange(6)[None])
    tokens.keep(torch.tensor([[0, 2, 3, 5]]))
    tokens.x = tokens.x + 100
    tokens.keep(torch.tensor([[0, 3]]))
    tokens.x = tokens.x + 100
    added = torch.tensor([200, 0, 100, 100, 0, 200.0])
    torch.testing.assert_close(tokens.all(), x + added[None, :, None])


def test_engines_agree_at_every_batch(dit, tmp_path):
    model = MergeTokens(r=3).apply(dit.copy(), Context()).model
    path = exported(model, dit.inputs, tmp_path)
    agrees(model, [dit.inputs, tripled(dit.inputs)], path)
    builds(path, dit.inputs, tmp_path)


def test_onnx_runtime_takes_the_scatter_and_tensorrt_does_not(tmp_path):
    subject = vit("sdpa")
    model = MergeTokens(r=3, form="scatter", restore=False).apply(subject.copy(), Context()).model
    path = exported(model, subject.inputs, tmp_path)
    agrees(model, [subject.inputs], path)
    with pytest.raises(ToolchainError, match="Scatter"):
        builds(path, subject.inputs, tmp_path)
