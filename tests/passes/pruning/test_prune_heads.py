import copy

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.models.blocks.transformer import SelfAttention
from enginewright.models.voice.vevo import decoder
from enginewright.passes.contract import Context, Plan, macs
from enginewright.passes.kernel.heads import KeptHeads
from enginewright.passes.pruning.prune_heads import PruneHeads
from enginewright.passes.traits import HeadedAttention, layer_at, layers_of


def masked(subject, plan):
    """A copy of the model whose removed heads are silent: their columns of the output projection are zero."""
    model = subject.copy()
    for path, entry in plan.choice.items():
        layer = layer_at(model, path, HeadedAttention)
        with torch.no_grad():
            layer.output.weight.unflatten(1, (layer.heads, layer.head_dim))[:, entry.removed] = 0
    return model


def scale_head(layer, head, *, values=1.0, columns=1.0):
    """Scale what a head of a reference layer says, and how loudly the output projection repeats it."""
    width = layer.heads * layer.head_dim
    own = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
    with torch.no_grad():
        layer.qkv.weight[2 * width :][own] *= values
        layer.qkv.bias[2 * width :][own] *= values
        layer.proj.weight[:, own] *= columns


def removed(plan):
    return {path: list(entry.removed) for path, entry in plan.choice.items()}


# Exactness


@pytest.mark.parametrize("importance", ["weight_norm", "taylor"])
def test_a_removed_head_is_a_masked_head(subject, importance):
    before = subject.output(subject.model)

    result = PruneHeads(share=0.5, importance=importance).apply(subject.copy(), Context(calibration=[subject.inputs]))

    after = subject.output(result.model)
    assert result.changed == subject.paths
    torch.testing.assert_close(after, subject.output(masked(subject, result.plan)), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-2  # the heads were not silent: the comparison above could fail


def test_a_pruned_model_can_be_pruned_again(subject):
    context = Context(calibration=[subject.inputs])
    first = PruneHeads(share=0.25).apply(subject.copy(), context)
    once = copy.deepcopy(first.model)

    second = PruneHeads(share=0.34).apply(first.model, context)

    assert [entry.of for entry in second.plan.choice.values()] == [3, 3]
    for path, entry in second.plan.choice.items():
        layer = layer_at(once, path, HeadedAttention)
        with torch.no_grad():
            layer.output.weight.unflatten(1, (3, 8))[:, entry.removed] = 0
    torch.testing.assert_close(subject.output(second.model), subject.output(once), atol=1e-5, rtol=0)


def test_silent_heads_go_and_the_output_stays(dit):
    model = dit.copy()
    for block, head in zip(model.blocks, (2, 0), strict=True):
        scale_head(block.attn, head, columns=0)
    before = dit.output(model)

    result = PruneHeads(share=0.25).apply(model, Context())

    assert removed(result.plan) == {"blocks.0.attn": [2], "blocks.1.attn": [0]}
    torch.testing.assert_close(dit.output(result.model), before, atol=1e-5, rtol=0)


def test_loud_heads_go_and_the_output_moves(dit):
    before = dit.output(dit.model)

    result = PruneHeads(share=0.75).apply(dit.copy(), Context())

    assert (dit.output(result.model) - before).abs().max() > 0.1


def test_a_share_of_nothing_changes_nothing_and_says_so(subject):
    before = copy.deepcopy(subject.model.state_dict())

    result = PruneHeads(share=0).apply(subject.copy(), Context())

    assert result.changed == ()
    assert result.before == result.after
    assert result.plan.skipped == dict.fromkeys(subject.paths, "a share of 0.0 of its 4 heads rounds to none")
    torch.testing.assert_close(result.model.state_dict(), before, atol=0, rtol=0)


# Which heads


def test_taylor_finds_a_silent_head_that_weight_norm_takes_for_the_strongest(dit):
    model = dit.copy()
    for block in model.blocks:
        scale_head(block.attn, 1, values=0, columns=10)

    by_norm = PruneHeads(importance="weight_norm").plan(model, Context())
    by_taylor = PruneHeads(importance="taylor").plan(model, Context(calibration=[dit.inputs]))

    assert all(entry.removed == (1,) for entry in by_taylor.choice.values())
    assert all(max(scores) == scores[1] for scores in by_norm.facts.scores.values())


def test_weight_norm_drops_a_head_whose_loud_values_taylor_hears(dit):
    model = dit.copy()
    for block in model.blocks:
        scale_head(block.attn, 1, values=100, columns=0.5)

    by_norm = PruneHeads(importance="weight_norm").plan(model, Context())
    by_taylor = PruneHeads(importance="taylor").plan(model, Context(calibration=[dit.inputs]))

    assert all(entry.removed == (1,) for entry in by_norm.choice.values())
    assert all(max(scores) == scores[1] for scores in by_taylor.facts.scores.values())


def test_taylor_of_a_last_linear_layer_is_what_leaving_a_head_out_changes():
    """With nothing after the layer, the score is |<signs, what the head adds to the output>|, summed over probes."""
    layer = SelfAttention(8, 4)
    x = torch.randn(1, 1, 8)
    value = nn.functional.linear(x, layer.qkv.weight[16:], layer.qkv.bias[16:])  # one token attends to itself
    added = torch.stack([value[0, 0, 2 * h : 2 * h + 2] @ layer.proj.weight[:, 2 * h : 2 * h + 2].T for h in range(4)])
    generator = torch.Generator().manual_seed(5)
    signs = [torch.randint(0, 2, (1, 1, 8), generator=generator) * 2 - 1 for _ in range(4)]
    expected = sum((added @ sign[0, 0].float()).abs() for sign in signs)  # (H,)

    plan = PruneHeads(importance="taylor").plan(layer, Context(calibration=[{"x": x}], seed=5))

    torch.testing.assert_close(torch.tensor(plan.facts.scores[""]), expected.detach(), rtol=1e-4, atol=0)


def test_taylor_is_not_blind_behind_a_last_layer_norm():
    """A mean square would be: a layer norm fixes it, so that no head could change it."""
    layer = SelfAttention(8, 4)
    scale_head(layer, 2, values=0.01)
    model = nn.Sequential(layer, nn.LayerNorm(8))

    plan = PruneHeads(importance="taylor").plan(model, Context(calibration=[{"input": torch.randn(4, 5, 8)}]))

    assert removed(plan) == {"0": [2]}
    assert sorted(plan.facts.scores["0"])[1] > 1


def test_equal_scores_are_broken_by_index():
    layer = SelfAttention(8, 4)
    nn.init.ones_(layer.proj.weight)

    plan = PruneHeads(share=0.5).plan(layer, Context())

    assert plan.choice[""] == KeptHeads(kept=(2, 3), removed=(0, 1), of=4)


@pytest.mark.parametrize(
    ("share", "heads", "gone"), [(0.25, 4, 1), (0.25, 6, 2), (0.3, 4, 1), (0.5, 3, 2), (0.99, 4, 3), (0.5, 2, 1)]
)
def test_a_share_is_rounded_to_heads_and_one_stays(share, heads, gone):
    plan = PruneHeads(share=share).plan(SelfAttention(12, heads), Context())

    assert len(plan.choice[""].removed) == gone
    assert len(plan.choice[""].kept) == heads - gone
    assert list(plan.choice[""].kept) == sorted(plan.choice[""].kept)


def test_global_takes_the_weakest_wherever_they_are():
    """Two heads of one layer are faint; the other layer is ten times as loud, which counts for nothing."""
    model = nn.Sequential(SelfAttention(8, 4), SelfAttention(8, 4))
    for head in (1, 3):
        scale_head(model[1], head, columns=1e-3)
    with torch.no_grad():
        model[1].proj.weight.mul_(10)

    plan = PruneHeads(share=0.25, scope="global").plan(model, Context())

    assert removed(plan) == {"1": [1, 3]}
    assert plan.skipped == {"0": "its heads are all stronger than those that a share of 0.25 takes elsewhere"}


def test_global_leaves_each_layer_its_strongest_head():
    model = nn.Sequential(SelfAttention(8, 4), SelfAttention(8, 2))
    plan = PruneHeads(share=0.99, scope="global").plan(model, Context())
    assert [len(entry.kept) for entry in plan.choice.values()] == [1, 1]


def test_globally_removed_heads_are_masked_heads(subject):
    result = PruneHeads(share=0.5, scope="global").apply(subject.copy(), Context())
    assert sum(len(entry.removed) for entry in result.plan.choice.values()) == 4
    wanted = subject.output(masked(subject, result.plan))
    torch.testing.assert_close(subject.output(result.model), wanted, atol=1e-5, rtol=0)
    assert PruneHeads(share=0, scope="global").plan(subject.model, Context()).choice == {}


# What a plan says


@pytest.mark.parametrize("importance", ["weight_norm", "taylor"])
def test_a_plan_is_repeatable_readable_and_replayed_without_data(subject, importance):
    step = PruneHeads(importance=importance)
    context = Context(calibration=[subject.inputs])
    plan = step.plan(subject.model, context)
    assert step.plan(subject.model, context).digest() == plan.digest()

    replayed = Plan.from_json(plan.as_json(), by=step.declared)
    models = [step.rewrite(subject.copy(), each) for each in (plan, replayed)]

    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), atol=0, rtol=0)
    assert set(plan.facts.scores) == set(subject.paths)
    assert all(score == float(f"{score:.6g}") for scores in plan.facts.scores.values() for score in scores)


def test_a_plan_can_be_replayed_where_there_are_no_weights(dit):
    step = PruneHeads(share=0.5)
    plan = step.plan(dit.model, Context())

    empty = step.rewrite(dit.copy().to("meta"), plan)

    real = step.rewrite(dit.copy(), plan)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_planning_leaves_the_model_as_it_was(subject):
    model = subject.copy()
    model.train()
    next(model.children()).eval()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    tensors = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]

    PruneHeads(importance="taylor").plan(model, Context(calibration=[subject.inputs]))

    torch.testing.assert_close(model.state_dict(), tensors, atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer.output._forward_pre_hooks for _, layer in layers_of(model, HeadedAttention))


def test_a_failing_model_keeps_no_hook_and_its_mode():
    model = nn.Sequential(SelfAttention(8, 4), nn.Linear(3, 3))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PruneHeads(importance="taylor").plan(model, Context(calibration=[{"input": torch.randn(1, 2, 8)}]))

    assert not model[0].proj._forward_pre_hooks
    assert model.training


def test_taylor_reads_a_frozen_model(dit):
    context = Context(calibration=[dit.inputs])
    frozen = dit.copy().requires_grad_(False)

    assert (
        PruneHeads(importance="taylor").plan(frozen, context).as_json()
        == PruneHeads(importance="taylor").plan(dit.model, context).as_json()
    )


def test_progress_is_told():
    told = []
    calibration = [{"x": torch.randn(1, 2, 8)}] * 3
    context = Context(calibration=calibration, say=lambda done, total, text: told.append((done, total)))

    plan = PruneHeads(importance="taylor").plan(SelfAttention(8, 4), context)

    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert plan.facts.calibration_batches == 3


# What is left alone


def test_each_layer_left_alone_has_its_reason():
    odd = SelfAttention(8, 4)
    odd.head_bias = nn.Parameter(torch.zeros(4))
    model = nn.ModuleDict(
        {
            "cut": SelfAttention(8, 4),
            "single": SelfAttention(8, 1),
            "pair": SelfAttention(8, 2),
            "spared": SelfAttention(8, 4),
            "odd": odd,
            "foreign": nn.MultiheadAttention(8, 4),
            "mlp": nn.Linear(8, 8),
        }
    )

    result = PruneHeads(share=0.2, exclude=("spa*",)).apply(model, Context())

    assert result.changed == ("cut",)
    assert result.plan.skipped == {
        "single": "has one head only",
        "pair": "a share of 0.2 of its 2 heads rounds to none",
        "spared": "excluded by 'spa*'",
        "odd": "its part 'head_bias' may depend on the heads",
        "foreign": "no family knows how the heads of a MultiheadAttention are laid out",
    }
    assert [model[name].heads for name in ("cut", "spared", "odd")] == [3, 4, 4]


def test_a_layer_that_never_runs_is_not_judged_by_taylor():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = SelfAttention(8, 4), SelfAttention(8, 4)

        def forward(self, x):
            return self.used(x)

    plan = PruneHeads(importance="taylor").plan(Idle(), Context(calibration=[{"x": torch.randn(2, 3, 8)}]))

    assert list(plan.choice) == ["used"]
    assert plan.skipped == {"idle": "the calibration inputs never reach it"}


def test_a_model_without_attention_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2))

    plan = PruneHeads(importance="taylor").plan(model, Context(calibration=[{"input": torch.randn(1, 2)}]))

    assert (plan.choice, plan.skipped) == ({}, {})


# What a user can mend


def test_taylor_without_calibration_says_what_to_do():
    with pytest.raises(ToolchainError, match="'taylor' needs calibration inputs") as caught:
        PruneHeads(importance="taylor").plan(SelfAttention(8, 4), Context())
    assert "weight_norm" in caught.value.help


@pytest.mark.parametrize("importance", ["weight_norm", "taylor"])
def test_weights_without_values_cannot_be_judged(dit, importance):
    with pytest.raises(ToolchainError, match="meta device") as caught:
        PruneHeads(importance=importance).plan(dit.copy().to("meta"), Context(calibration=[dit.inputs]))
    assert caught.value.where == "blocks.0.attn"
    assert "load the model's weights" in caught.value.help


def test_a_pattern_that_protects_nothing_is_an_error():
    model = nn.ModuleDict({"attn": SelfAttention(8, 4)})

    with pytest.raises(ToolchainError, match=r"exclude 'atn' matches no attention layer") as caught:
        PruneHeads(exclude=("atn",)).plan(model, Context())
    assert caught.value.help == "attention layers: attn"


def test_weights_that_are_not_numbers_cannot_be_judged():
    model = nn.ModuleDict({"attn": SelfAttention(8, 4)})
    nn.init.constant_(model["attn"].proj.weight, float("nan"))

    with pytest.raises(ToolchainError, match=r"not finite: .*nan") as caught:
        PruneHeads().plan(model, Context())
    assert caught.value.where == "attn"


def test_a_plan_for_another_model_is_refused(dit):
    step = PruneHeads()
    plan = step.plan(dit.model, Context())
    model = step.rewrite(dit.copy(), plan)

    with pytest.raises(ToolchainError, match="for a layer of 4 heads; this one has 3"):
        step.rewrite(model, plan)


def test_taylor_needs_an_output_that_leads_back_to_the_heads():
    class Cut(SelfAttention):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    class Counts(SelfAttention):
        def forward(self, x):
            return {"token": super().forward(x).argmax(-1)}

    context = Context(calibration=[{"x": torch.randn(1, 2, 8)}])
    with pytest.raises(ToolchainError, match="cuts gradients"):
        PruneHeads(importance="taylor").plan(Cut(8, 4), context)
    with pytest.raises(ToolchainError, match="floating-point output; this model gives a dict"):
        PruneHeads(importance="taylor").plan(Counts(8, 4), context)


@pytest.mark.parametrize("share", [1, -0.1, float("nan")])
def test_a_share_out_of_range_is_quoted(share):
    with pytest.raises(ToolchainError, match=rf"prune_heads: share is {share}"):
        PruneHeads(share=share)


def test_an_unknown_importance_is_quoted():
    with pytest.raises(ToolchainError, match="importance is 'magic'"):
        PruneHeads(importance="magic")


# What it saves


def test_parameters_and_macs_fall_as_computed_by_hand(dit):
    """DiT tiny: 2 layers, width 32, 4 heads of 8, 16 tokens, 2 images; each layer loses one head."""
    result = PruneHeads(share=0.25).apply(dit.copy(), Context(example=dit.inputs))

    parameters = (3 * 8) * 32 + 3 * 8 + 32 * 8  # rows of q, k, v with their biases; columns of the output
    products = 16 * 32 * (3 * 8) + 16 * 16 * 8 + 16 * 16 * 8 + 16 * 8 * 32  # q, k, v; scores; mix; output
    assert result.before.parameter_count - result.after.parameter_count == 2 * parameters == 2096
    assert result.before.macs - result.after.macs == 2 * 2 * products == 81920
    assert result.before.bytes - result.after.bytes == 4 * 2096


def test_fused_attention_is_counted_as_attention():
    """One layer: 3 of 8x8 and one 8x8 projections of 5 tokens, and 5x5 scores and mix of width 8."""
    assert macs(SelfAttention(8, 4), {"x": torch.randn(1, 5, 8)}) == 5 * 8 * 32 + 2 * 5 * 5 * 8


# What follows


def test_a_pruned_model_exports_and_runs(dit, tmp_path):
    import onnxruntime

    model = PruneHeads(share=0.5).apply(dit.copy(), Context()).model
    path = tmp_path / "model.onnx"

    torch.onnx.export(model, kwargs=dit.inputs, f=path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in dit.inputs.items()})

    torch.testing.assert_close(torch.from_numpy(output), dit.output(model), atol=1e-4, rtol=0)


def test_heads_whose_keys_are_a_sequences_state_are_left_alone():
    model = decoder.build(decoder.TINY).eval()
    result = PruneHeads(share=0.25).apply(model, Context())
    assert not result.changed
    assert "a sequence's state holds its keys" in result.plan.skipped["networks.model.decoder.layers.0.self_attn"]
