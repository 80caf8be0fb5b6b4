import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.moe import clusters, routers
from enginewright.passes.moe.dense_to_moe import DenseToMoe
from enginewright.passes.moe.experts import CapacityExperts, MixtureOfExperts, NonzeroExperts
from enginewright.passes.traits import FeedForward, layers_of
from enginewright.targets.onnx_export import export_onnx


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def context(subject):
    return Context(calibration=[subject.inputs])


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def converted(subject, plan, form):
    return DenseToMoe(form=form).rewrite(subject.copy(), plan)


# Exactness


@pytest.mark.parametrize("form", ["masked", "capacity", "nonzero"])
def test_all_experts_with_gates_of_one_are_the_dense_layer(subject, form):
    before = subject.output(subject.model)

    result = DenseToMoe(top_k=12, gate="one", form=form).apply(subject.copy(), context(subject))

    assert len(result.changed) == len(mixtures(result.model)) == 2
    torch.testing.assert_close(subject.output(result.model), before, atol=1e-4, rtol=0)


def test_every_form_is_the_masked_form_while_all_find_a_slot(subject):
    plan = DenseToMoe(top_k=3).plan(subject.model, context(subject))
    masked = subject.output(converted(subject, plan, "masked"))

    assert all(entry["overflow"] == 0 for entry in plan.facts.layers.values())
    assert (masked - subject.output(subject.model)).abs().max() > 1e-2  # the comparisons below could fail
    apart = DenseToMoe(products="separate").rewrite(subject.copy(), plan)
    for model in (converted(subject, plan, "capacity"), converted(subject, plan, "nonzero"), apart):
        torch.testing.assert_close(subject.output(model), masked, atol=1e-5, rtol=0)


def test_masking_the_dense_layers_units_is_the_masked_form(subject):
    """What the loads are measured on is what will run."""
    plan = DenseToMoe().plan(subject.model, context(subject))
    model = converted(subject, plan, "masked")
    seen = []
    for module in mixtures(model):
        module.router.register_forward_hook(lambda *call: seen.append(call[2].topk(2).indices.flatten().bincount()))
    subject.output(model)

    for loads, facts in zip(seen, plan.facts.layers.values(), strict=True):
        padded = nn.functional.pad(loads, (0, 12 - len(loads)))
        assert padded.tolist() == facts["load"]
        assert sum(facts["load"]) == facts["samples"] * facts["tokens"] * 2


def test_the_layers_weights_are_kept_and_a_router_comes_on_top(subject):
    result = DenseToMoe().apply(subject.copy(), Context(calibration=[subject.inputs], example=subject.inputs))

    assert result.after.parameter_count == result.before.parameter_count + 2 * (32 * 12 + 12)
    for facts in result.plan.facts.layers.values():
        assert facts["active_share"] == 0.375  # a quarter shared, and 2 of 12 of the rest


def test_no_expert_leaves_the_pruned_layer(subject):
    plan = DenseToMoe(top_k=0).plan(subject.model, context(subject))
    pruned = subject.copy()
    for path, layer in list(layers_of(pruned, FeedForward)):
        layer.keep_hidden(plan.choice[path].shared)

    for form in ("masked", "capacity", "nonzero"):
        torch.testing.assert_close(subject.output(converted(subject, plan, form)), subject.output(pruned))
    assert all(facts["overflow"] == 0 for facts in plan.facts.layers.values())


def test_softmax_gates_are_not_normalised_over_the_chosen(dit):
    plan = DenseToMoe(form="masked", router="random").plan(dit.model, context(dit))
    [layer, _] = mixtures(converted(dit, plan, "masked"))
    x = 0.1 * torch.randn(1, 1, 32)
    weights = layer.router(x).softmax(-1)[0, 0]
    best = weights.argsort(descending=True)[:2]
    answers = layer.experts(x)  # (E, 1, D)

    wanted = layer.shared(x) + sum(weights[e] * answers[e] for e in best)
    torch.testing.assert_close(layer(x), wanted)
    assert weights[best].sum() < 0.9


# Overflow


def crowd(layer, expert):
    """Send every token to one expert first."""
    with torch.no_grad():
        layer.router.bias[expert] = 1e4


def test_what_overflows_is_dropped_and_nothing_else(dit):
    plan = DenseToMoe(gate="one").plan(dit.model, context(dit))
    slots, full = (mixtures(converted(dit, plan, form))[0] for form in ("capacity", "masked"))
    for layer in (slots, full):
        crowd(layer, 3)
    slots.capacity = 5
    x = torch.randn(2, 16, 32)
    lost = full(x) - slots(x)  # (B, N, D)

    second = full.router(x).topk(2).indices[..., 1]  # the other expert of each token
    for sample in range(2):
        for token in range(16):
            late = [3] if token >= 5 else []
            if (second[sample, :token] == second[sample, token]).sum() >= 5:
                late.append(int(second[sample, token]))
            own = x[sample, token][None, None]
            wanted = sum((full.experts(own)[expert, 0] for expert in late), torch.zeros(32))
            torch.testing.assert_close(lost[sample, token], wanted, atol=1e-5, rtol=0)


def test_a_crowded_sample_does_not_take_anothers_slots(dit):
    plan = DenseToMoe(gate="one").plan(dit.model, context(dit))
    [layer, _] = mixtures(converted(dit, plan, "capacity"))
    layer.capacity = 4
    x = torch.randn(3, 16, 32)
    torch.testing.assert_close(layer(x)[2:], layer(x[2:]), atol=1e-6, rtol=0)


def test_a_share_of_drops_buys_fewer_slots_and_is_reported(dit):
    exact = DenseToMoe().plan(dit.model, context(dit))
    some = DenseToMoe(drop=0.5).plan(dit.model, context(dit))
    roomy = DenseToMoe(headroom=2).plan(dit.model, context(dit))
    for path, entry in some.choice.items():
        assert entry.capacity <= exact.choice[path].capacity <= roomy.choice[path].capacity == 16
        assert 0 <= some.facts.layers[path]["overflow"] <= 0.5

    loads = routers.Loads(tokens=40)
    loads.add(torch.tensor([[[0]] * 30 + [[1]] * 10]), 2)
    assert (loads.capacity(drop=0, headroom=1), loads.capacity(drop=0.25, headroom=1)) == (32, 24)
    assert loads.overflow(24) == 6 / 40


def test_overflow_is_told_of_calls_that_calibration_did_not_meet_and_can_be_limited(dit):
    met = context(dit)
    told = DenseToMoe().plan(dit.model, met).facts.notes
    assert told[0].startswith("at most 0.00% of a layer's choices of experts find no slot on the calibration calls")

    def others(count, seed):
        generator = torch.Generator().manual_seed(seed)
        return [{k: alike(v, generator) for k, v in call.items()} for call in met.calibration[:count]]

    new = replace(met, draw=others)
    two = DenseToMoe(experts=2, top_k=1, drop=0.9, router="random")  # of 16 tokens, 8 slots are the fewest
    [note] = two.plan(dit.model, new).facts.notes
    share = float(note.removeprefix("at most ").partition("%")[0]) / 100
    assert 0 < share < 1
    assert "calls that calibration did not meet" in note
    assert two.model_copy(update={"max_overflow": share + 0.001}).plan(dit.model, new).choice
    with pytest.raises(ToolchainError, match="find no slot") as caught:
        two.model_copy(update={"max_overflow": share - 0.001}).plan(dit.model, new)
    assert "raise headroom" in caught.value.help
    assert list(DenseToMoe(form="nonzero").plan(dit.model, new).facts.notes) == []


def alike(tensor, generator):
    """Other values of the same kind; whole numbers stay."""
    return torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor


# Shapes


@pytest.mark.parametrize("shape", [(3, 32), (3, 5, 32), (3, 4, 2, 32)])
def test_any_dimensions_may_stand_between_batch_and_width(dit, shape):
    plan = DenseToMoe().plan(dit.model, context(dit))
    layers = [mixtures(converted(dit, plan, form))[0] for form in ("masked", "capacity", "nonzero")]
    x = torch.randn(shape)
    wanted = layers[0](x)
    assert wanted.shape == shape
    for layer in layers[1:]:
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=0)


def test_a_model_in_half_precision_stays_in_it(dit):
    model = dit.copy().bfloat16()
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in dit.inputs.items()}
    result = DenseToMoe().apply(model, Context(calibration=[inputs]))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.model(**inputs).isfinite().all()


@pytest.mark.parametrize("activation", ["geglu", "swiglu", "gelu"])
def test_gated_activations(activation):
    from diffusers.models.attention import FeedForward as Layer

    model = Holder(Layer(8, mult=6, activation_fn=activation)).eval()
    x = torch.randn(2, 9, 8)
    step = DenseToMoe(experts=4, top_k=4, gate="one", importance="weight_norm")
    made = step.apply(copy.deepcopy(model), Context(calibration=[{"x": x}])).model
    torch.testing.assert_close(made(x), model(x), atol=1e-5, rtol=0)
    assert made.layer.experts.net[2].weight.shape == (4, 9, 8)


def test_gated_feed_forward_of_language_models():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = Holder(LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=50, num_attention_heads=2)))
    x = torch.randn(2, 9, 8)
    for form in ("capacity", "nonzero"):
        step = DenseToMoe(experts=4, top_k=4, gate="one", form=form)
        result = step.apply(copy.deepcopy(model), Context(calibration=[{"x": x}]))
        assert result.changed == ("layer",)
        torch.testing.assert_close(result.model(x), model(x), atol=1e-5, rtol=0)


def test_both_streams_of_double_blocks_are_cut_and_single_blocks_say_why_not():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.rand(2),
        "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    plan = DenseToMoe(gate="one", top_k=12).plan(model, Context(calibration=[inputs]))
    assert list(plan.choice) == ["transformer_blocks.0.ff", "transformer_blocks.0.ff_context"]
    assert "shares a projection" in plan.skipped["single_transformer_blocks.0"]
    made = DenseToMoe().rewrite(copy.deepcopy(model), plan)
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).sample, model(**inputs).sample, atol=1e-4, rtol=0)


def test_blocks_of_stable_diffusion_3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([3.0, 700.0]),
    }  # fmt: skip
    plan = DenseToMoe(top_k=4).plan(model, Context(calibration=[inputs]))
    assert len(plan.choice) == 3
    with torch.no_grad():
        outputs = [
            DenseToMoe(form=form).rewrite(copy.deepcopy(model), plan)(**inputs).sample
            for form in ("masked", "capacity", "nonzero")
        ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=0)


# The plan


def test_strong_units_are_shared_and_the_others_dealt_in_turns(dit):
    scores = torch.arange(16.0)
    shared, experts = DenseToMoe(experts=4, top_k=1, shared=0.25).deal(scores)
    assert shared == [12, 13, 14, 15]
    assert experts == [[3, 7, 11], [2, 6, 10], [1, 5, 9], [0, 4, 8]]

    model = dit.copy()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[:, 40:72] *= 50
    for importance in ("taylor", "weight_norm"):
        plan = DenseToMoe(importance=importance).plan(model, context(dit))
        assert plan.choice["blocks.0.mlp"].shared == tuple(range(40, 72))
    by_chance = DenseToMoe(importance="random").plan(model, context(dit))
    assert by_chance.choice["blocks.0.mlp"].shared != tuple(range(40, 72))


def test_units_that_answer_the_same_tokens_are_put_together_and_experts_are_of_one_size():
    """Three kinds of unit, each awake on tokens of its own kind; five of the first kind, where four fit."""
    kind = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 2])
    rows = torch.arange(30).remainder(3)
    sizes = (rows[:, None] == kind).float() * (1 + 0.1 * torch.rand(30, 12)) + 0.01 * torch.rand(30, 12)
    found = clusters.clusters_of(sizes, 3)
    assert sorted(unit for own in found for unit in own) == list(range(12))
    assert [len(own) for own in found] == [4, 4, 4]
    alike = [kind[own].bincount(minlength=3).max() for own in found]
    assert sorted(alike) == [3, 4, 4]  # the fifth of the first kind goes where there is room
    silent = torch.zeros(30, 12)
    assert sorted(unit for own in clusters.clusters_of(silent, 3) for unit in own) == list(range(12))


def test_clustered_experts_answer_more_like_the_dense_layer_than_those_dealt_in_turns(dit):
    """Units of two directions: tokens of one direction need one expert where their units are together."""
    model = dit.copy()
    direction = torch.randn(32)
    sign = torch.ones(128).index_fill(0, torch.randperm(128)[:64], -1)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.copy_(sign[:, None] * direction + 0.05 * torch.randn(128, 32))
            block.mlp.fc1.bias.zero_()
    held = dit.output(model)
    step = {"shared": 0.01, "experts": 2, "top_k": 1, "gate": "one", "form": "masked", "importance": "weight_norm"}
    made = {
        grouping: DenseToMoe(grouping=grouping, router="fitted", **step).apply(copy.deepcopy(model), context(dit))
        for grouping in ("turns", "clustered")
    }
    dealt = made["clustered"].plan.choice["blocks.0.mlp"].experts
    assert [len({float(sign[unit]) for unit in own}) for own in dealt] == [1, 1]
    errors = {grouping: (dit.output(result.model) - held).norm() for grouping, result in made.items()}
    assert errors["clustered"] < 0.5 * errors["turns"]


def test_a_fitted_router_finds_the_expert_that_answers(dit):
    """Units that only some tokens wake are told from the tokens; a random router does not find them."""
    model = dit.copy()
    step = DenseToMoe(experts=2, top_k=1, gate="one", importance="weight_norm", router="fitted", form="masked")
    dealt = [list(units) for units in step.plan(model, context(dit)).choice["blocks.0.mlp"].experts]
    direction = torch.randn(32)
    with torch.no_grad():
        mlp = model.blocks[0].mlp
        for sign, units in zip((1, -1), dealt, strict=True):
            mlp.fc1.weight[units] = 3 * sign * direction + 0.01 * torch.randn(len(units), 32)
            mlp.fc1.bias[units] = 0
    x = torch.randn(4, 64, 32)
    groups = {"layer": routers.Groups.of(dealt, 128)}
    holder = Holder(mlp)
    layers = dict(layers_of(holder, FeedForward))
    weight, bias = routers.fit(holder, layers, groups, Context(calibration=[{"x": x}]))["layer"]
    found = (x.double() @ weight.T + bias).argmax(-1)
    assert (found == (x @ direction < 0)).double().mean() > 0.95


def test_balancing_evens_the_loads(dit):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(600, 6, generator=generator) + torch.tensor([3.0, 0, 0, 0, 0, -3])
    bias = routers.even_bias(logits, torch.zeros(6), top_k=2)
    before, after = ((logits + b).topk(2).indices.flatten().bincount(minlength=6) for b in (0, bias))
    assert before.max() > 1.9 * 200
    assert after.max() < 1.1 * 200


def test_a_plan_is_told_apart_by_its_router(dit):
    plan = DenseToMoe().plan(dit.model, context(dit))
    other = Plan(choice=plan.choice, arrays={name: array + 1 for name, array in plan.arrays.items()})
    assert set(plan.arrays) == {f"blocks.{i}.mlp.router.{name}" for i in (0, 1) for name in ("weight", "bias")}
    model = DenseToMoe().rewrite(dit.copy(), plan)
    assert torch.equal(model.blocks[1].mlp.router.weight, plan.arrays["blocks.1.mlp.router.weight"])
    assert not torch.equal(dit.output(model), dit.output(DenseToMoe().rewrite(dit.copy(), other)))


def test_layers_left_alone_are_named(dit):
    plan = DenseToMoe(exclude=("blocks.0.*",), importance="random", router="random").plan(dit.model, context(dit))
    assert plan.skipped == {"blocks.0.mlp": "excluded by 'blocks.0.*'"}
    plan = DenseToMoe(experts=200).plan(dit.model, context(dit))
    assert plan.skipped["blocks.0.mlp"] == "has only 128 hidden units for 200 experts"
    assert not plan.choice
    none = nn.Linear(2, 2)
    assert "no family" in DenseToMoe().plan(none, Context(calibration=[{"input": torch.ones(1, 2)}])).skipped[""]


def test_a_layer_that_never_runs_is_left_alone(dit):
    model = dit.copy()
    model.spare = copy.deepcopy(model.blocks[0])
    for importance in ("taylor", "weight_norm", "random"):
        for router, grouping in (("balanced", "turns"), ("random", "clustered")):
            plan = DenseToMoe(importance=importance, router=router, grouping=grouping).plan(model, context(dit))
            assert list(plan.choice) == ["blocks.0.mlp", "blocks.1.mlp"]
            assert plan.skipped == {"spare.mlp": "the calibration inputs never reach it"}


# Faults


def test_what_cannot_be_is_refused(dit):
    with pytest.raises(ToolchainError, match="top_k is 13; there are 12 experts"):
        DenseToMoe(top_k=13)
    with pytest.raises(ToolchainError, match="'nothing' matches no feed-forward"):
        DenseToMoe(exclude=("nothing",)).plan(dit.model, context(dit))
    with pytest.raises(ToolchainError, match="needs calibration inputs"):
        DenseToMoe().apply(dit.copy(), Context())
    with pytest.raises(ToolchainError, match="meta device"):
        DenseToMoe().plan(dit.copy().to("meta"), context(dit))
    plan = DenseToMoe().plan(dit.model, context(dit))
    smaller = dit.copy()
    smaller.blocks[0].mlp = nn.Identity()
    smaller.blocks[0].mlp = type(dit.model.blocks[0].mlp)(32, 64)
    with pytest.raises(ToolchainError, match="for a layer of 128 hidden units; this one has 64"):
        DenseToMoe().rewrite(smaller, plan)


def test_scores_that_are_not_finite_are_refused(dit):
    model = dit.copy()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[0, 0] = float("nan")
    with pytest.raises(ToolchainError, match="not finite"):
        DenseToMoe().plan(model, context(dit))


# Export


@pytest.mark.parametrize("form", ["capacity", "nonzero"])
def test_it_runs_in_onnx_runtime_whatever_the_batch_and_the_tokens(dit, form, tmp_path):
    import onnxruntime

    plan = DenseToMoe(gate="one", importance="random").plan(dit.model, context(dit))
    layer = mixtures(converted(dit, plan, form))[0]
    assert isinstance(layer, CapacityExperts if form == "capacity" else NonzeroExperts)
    example, path = {"x": torch.randn(2, 16, 32)}, tmp_path / "m.onnx"
    dynamic = {"x": {0: ("batch", 1, 8), 1: ("tokens", 2, 64)}}
    export_onnx(Holder(layer).eval(), example, dynamic=dynamic, outputs=["y"], path=path)
    session = onnxruntime.InferenceSession(path)
    for batch, tokens in ((1, 16), (2, 5), (5, 40)):
        x = torch.randn(batch, tokens, 32)
        [found] = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), layer(x).detach(), atol=1e-5, rtol=0)


def test_the_form_of_fixed_shapes_builds_for_tensorrt_rtx(dit, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from enginewright.targets.contract import Graph, ShapeRange
    from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx

    plan = DenseToMoe(importance="random").plan(dit.model, context(dit))
    layer = mixtures(converted(dit, plan, "capacity"))[0]
    path, folder = tmp_path / "m.onnx", tmp_path / "engine"
    folder.mkdir()
    example = {"x": torch.randn(2, 16, 32)}
    export_onnx(Holder(layer).eval(), example, dynamic={"x": {0: ("batch", 1, 8)}}, outputs=["y"], path=path)
    ranges = {"x": ShapeRange((1, 16, 32), (2, 16, 32), (8, 16, 32))}
    TensorRtRtx().build(Graph(path=path, ranges=ranges), folder)
    assert (folder / "engine.plan").stat().st_size > 1000
