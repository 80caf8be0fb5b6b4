from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.models.blocks.transformer import Mlp
from enginewright.passes.contract import Context, Plan
from enginewright.passes.pruning.prune_width import PruneWidth, RemovedUnits
from enginewright.passes.traits import FeedForward, layer_at, layers_of, trait_of
from tests.engines import built, exported, in_onnxruntime

IMPORTANCES = ["weight_norm", "taylor", "activation", "random"]


def masked(subject, plan):
    """A copy of the model whose removed units are silent: their columns of the output projection are zero."""
    model = subject.copy()
    for path, entry in plan.choice.items():
        layer = layer_at(model, path, FeedForward)
        with torch.no_grad():
            layer.output.weight[:, [layer.first_column + unit for unit in entry.removed]] = 0
    return model


def two(width: int = 4, hidden: int = 16) -> nn.Sequential:
    return nn.Sequential(Mlp(width, hidden), Mlp(width, hidden))


def scaled(layer: Mlp, units: slice, factor: float) -> None:
    with torch.no_grad():
        layer.fc2.weight[:, units] *= factor


# Exactness


@pytest.mark.parametrize(
    ("importance", "scope"), [*((name, "layer") for name in IMPORTANCES), ("weight_norm", "global")]
)
def test_a_removed_unit_is_a_masked_unit(subject, importance, scope):
    before = subject.output(subject.model)

    step = PruneWidth(share=0.5, importance=importance, scope=scope)
    result = step.apply(subject.copy(), Context(calibration=[subject.inputs]))

    after = subject.output(result.model)
    assert len(result.changed) == 2
    torch.testing.assert_close(after, subject.output(masked(subject, result.plan)), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-2  # the units were not silent: the comparison above could fail
    kept = [layer.hidden for _, layer in layers_of(result.model, FeedForward)]
    assert all(number % 8 == 0 for number in kept)
    assert sum(kept) in (128, 48)


@pytest.mark.parametrize("importance", ["weight_norm", "taylor", "activation"])
def test_silent_units_go_and_the_output_stays(dit, importance):
    model = dit.copy()
    for number, block in enumerate(model.blocks):
        scaled(block.mlp, slice(8 * number, 8 * number + 16), 0)
    before = dit.output(model)

    result = PruneWidth(share=0.125, importance=importance).apply(model, Context(calibration=[dit.inputs]))

    assert [entry.removed for entry in result.plan.choice.values()] == [tuple(range(16)), tuple(range(8, 24))]
    torch.testing.assert_close(dit.output(result.model), before, atol=1e-5, rtol=0)


def test_a_share_of_nothing_changes_nothing_and_says_so(subject):
    before = copy.deepcopy(subject.model.state_dict())

    for scope in ("layer", "global"):
        result = PruneWidth(share=0, scope=scope).apply(subject.copy(), Context())
        assert result.changed == ()
        assert [reason.startswith("a share of 0.0 of its") for reason in result.plan.skipped.values()] == [True] * 2
        torch.testing.assert_close(result.model.state_dict(), before, atol=0, rtol=0)


def test_units_beside_an_attention_go_alone():
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    block = FluxSingleTransformerBlock(8, 2, 4, mlp_ratio=4.0)
    with torch.no_grad():
        block.proj_out.weight[:, 8 + 16 :] *= 1e-6
    inputs = torch.randn(1, 3, 8), torch.randn(1, 2, 8), torch.randn(1, 8)
    before = block(*inputs)

    result = PruneWidth(share=0.5).apply(nn.ModuleDict({"block": block}), Context())

    assert result.plan.choice == {"block": RemovedUnits(removed=tuple(range(16, 32)), of=32)}
    torch.testing.assert_close(block(*inputs), before, atol=1e-4, rtol=0)


# What is judged


def test_scores_by_hand():
    layer = Mlp(3, 16)
    x = torch.randn(5, 3)
    rows, column = layer.fc1.weight.norm(dim=1), layer.fc2.weight.norm(dim=0)
    hidden = layer.act(layer.fc1(x))
    context = Context(calibration=[{"x": x}])
    wanted = {
        "weight_norm": rows * column,
        "activation": hidden.norm(dim=0) * layer.fc2.weight.abs().sum(dim=0),
    }
    for importance, score in wanted.items():
        plan = PruneWidth(share=0.5, importance=importance).plan(nn.Sequential(layer), with_name(context))
        ranked = score.argsort().tolist()
        assert plan.choice["0"] == RemovedUnits(removed=tuple(sorted(ranked[:8])), of=16)
        limits = plan.facts.scores["0"]
        assert limits["strongest_removed"] == pytest.approx(score[ranked[7]].item(), rel=1e-5)
        assert limits["weakest_kept"] == pytest.approx(score[ranked[8]].item(), rel=1e-5)


def with_name(context: Context) -> Context:
    """The same calls for an ``nn.Sequential``, whose input has another name."""
    return Context(calibration=[{"input": call["x"]} for call in context.calibration], seed=context.seed)


def test_taylor_by_hand():
    """Autograd on the weights themselves gives the changes that are made from activations."""
    layer = Mlp(3, 16)
    x = torch.randn(5, 3)
    generator = torch.Generator().manual_seed(3)
    score = torch.zeros(16)
    for _ in range(4):
        output = layer(x)
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        weights = (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight)
        one, bias, other = (
            (w * g).abs() for w, g in zip(weights, torch.autograd.grad((output * signs).sum(), weights), strict=True)
        )
        score += (one.sum(dim=1) + bias + other.sum(dim=0)).detach()

    plan = PruneWidth(share=0.5, importance="taylor").plan(layer, Context(calibration=[{"x": x}], seed=3))

    ranked = score.argsort().tolist()
    assert plan.choice[""].removed == tuple(sorted(ranked[:8]))
    assert plan.facts.scores[""]["strongest_removed"] == pytest.approx(score[ranked[7]].item(), rel=1e-4)


def test_both_projections_of_a_gated_layer_count():
    from diffusers.models.attention import FeedForward as Layer

    layer = Layer(4, mult=4, activation_fn="geglu")
    with torch.no_grad():
        layer.net[0].proj.weight[16 + 3] = 0  # the gate of unit 3 is shut
    plan = PruneWidth(share=0.0625, round_to=1).plan(nn.ModuleDict({"ff": layer}), Context())
    assert plan.choice["ff"].removed == (3,)


def test_random_units_are_drawn_from_the_seed():
    plans = [PruneWidth(importance="random").plan(two(), Context(seed=seed)) for seed in (0, 0, 1)]
    assert plans[0].digest() == plans[1].digest()
    assert plans[0].choice != plans[2].choice


# How many


@pytest.mark.parametrize(
    ("share", "hidden", "round_to", "kept"),
    [(0.25, 64, 8, 48), (0.3, 64, 8, 48), (0.99, 64, 8, 8), (0.1, 20, 8, 16), (0.5, 20, 1, 10), (0.5, 10, 4, 4)],
)
def test_what_stays_is_a_multiple(share, hidden, round_to, kept):
    plan = PruneWidth(share=share, round_to=round_to).plan(Mlp(4, hidden), Context())
    assert hidden - len(plan.choice[""].removed) == kept


def test_global_takes_the_weakest_wherever_they_are():
    """Of one layer's scores one part is far below the rest: the share of both layers is taken there."""
    model = two(hidden=32)
    scaled(model[1], slice(0, 16), 1e-3)

    plan = PruneWidth(share=0.25, scope="global").plan(model, Context())

    assert plan.choice == {"1": RemovedUnits(removed=tuple(range(16)), of=32)}
    assert plan.skipped == {"0": "its units are all stronger than those that a share of 0.25 takes elsewhere"}
    assert plan.facts.units == {"of": 64, "removed": 16}


def test_global_leaves_each_layer_its_floor():
    model = two(hidden=32)
    scaled(model[1], slice(0, 24), 1e-3)

    plan = PruneWidth(share=0.5, scope="global", floor=0.5).plan(model, Context())

    assert [32 - len(entry.removed) for entry in plan.choice.values()] == [16, 16]
    assert set(plan.choice["1"].removed) < set(range(24))


def test_layers_of_another_size_are_made_comparable():
    """A layer that is ten times as loud as the other loses as much."""
    model = two(hidden=64)
    with torch.no_grad():
        model[1].load_state_dict(model[0].state_dict())
    scaled(model[1], slice(None), 10)

    plan = PruneWidth(share=0.5, scope="global").plan(model, Context())

    assert plan.choice["0"] == plan.choice["1"]


# What a plan says


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_plan_is_repeatable_and_replayed_without_data_or_weights(dit, importance):
    step = PruneWidth(importance=importance)
    context = Context(calibration=[dit.inputs])
    plan = step.plan(dit.model, context)
    assert step.plan(dit.model, context).digest() == plan.digest()

    replayed = step.rewrite(dit.copy(), Plan.from_json(plan.as_json(), by=step.declared))
    empty = step.rewrite(dit.copy().to("meta"), plan)

    real = step.rewrite(dit.copy(), plan)
    torch.testing.assert_close(real.state_dict(), replayed.state_dict(), atol=0, rtol=0)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_planning_leaves_the_model_as_it_was(dit, importance):
    model = dit.copy().train()
    next(model.children()).eval()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    tensors, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    state = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]

    PruneWidth(importance=importance).plan(model, Context(calibration=[dit.inputs]))

    torch.testing.assert_close(model.state_dict(), tensors, atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert state == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_each_layer_left_alone_has_its_reason():
    class OddMlp(nn.Module):
        pass

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.spared = Mlp(4, 32), Mlp(4, 32), Mlp(4, 32)
            self.narrow, self.odd = Mlp(4, 8), OddMlp()

        def forward(self, x):
            return self.narrow(self.spared(self.used(x)))

    model, calls = Idle(), [{"x": torch.randn(2, 4)}]
    for importance in ("taylor", "activation"):
        plan = PruneWidth(importance=importance, exclude=("spa*",)).plan(model, Context(calibration=calls))
        assert list(plan.choice) == ["used"]
        assert plan.skipped == {
            "odd": "no family knows how the hidden units of a OddMlp are laid out",
            "spared": "excluded by 'spa*'",
            "narrow": "has 8 hidden units, no more than the smallest number, 8",
            "idle": "the calibration inputs never reach it",
        }
    assert PruneWidth(share=0.1, exclude=("*",)).plan(two(), Context()).choice == {}
    assert PruneWidth(share=0.1).plan(two(), Context()).skipped["0"] == "a share of 0.1 of its 16 units rounds to none"


# What a user can mend


@pytest.mark.parametrize("importance", ["taylor", "activation"])
def test_without_calibration_it_says_what_to_do(importance):
    with pytest.raises(ToolchainError, match=f"'{importance}' needs calibration inputs") as caught:
        PruneWidth(importance=importance).plan(two(), Context())
    assert "weight_norm" in caught.value.help


@pytest.mark.parametrize("importance", ["weight_norm", "taylor", "activation"])
def test_weights_without_values_cannot_be_judged(dit, importance):
    with pytest.raises(ToolchainError, match="meta device") as caught:
        PruneWidth(importance=importance).plan(dit.copy().to("meta"), Context(calibration=[dit.inputs]))
    assert caught.value.where == "blocks.0.mlp"


def test_weights_that_are_not_numbers_cannot_be_judged():
    model = two()
    nn.init.constant_(model[1].fc2.weight[:, :3], float("nan"))
    with pytest.raises(ToolchainError, match="importance of 3 units is not finite") as caught:
        PruneWidth().plan(model, Context())
    assert caught.value.where == "1"


def test_a_pattern_that_protects_nothing_is_an_error():
    with pytest.raises(ToolchainError, match=r"exclude 'x' matches no feed-forward") as caught:
        PruneWidth(exclude=("x",)).plan(two(), Context())
    assert caught.value.help == "feed-forwards: 0, 1"


def test_a_plan_for_another_model_is_refused(dit):
    step = PruneWidth()
    plan = step.plan(dit.model, Context())
    model = step.rewrite(dit.copy(), plan)
    with pytest.raises(ToolchainError, match="for a layer of 128 hidden units; this one has 96"):
        step.rewrite(model, plan)


@pytest.mark.parametrize(("name", "value"), [("share", 1), ("round_to", 0), ("floor", 1.5), ("importance", "magic")])
def test_a_parameter_out_of_range_is_quoted(name, value):
    with pytest.raises(ToolchainError, match=rf"prune_width: {name} is {value!r}"):
        PruneWidth(**{name: value})


# What follows


def test_weights_on_disk_are_read_where_they_lie(dit, tmp_path):
    """One layer of weights is mapped read-only; scores and the smaller form come from there."""
    from safetensors.torch import save_file

    from enginewright.targets import stored

    save_file(dit.model.state_dict(), tmp_path / "w.safetensors")
    model = dit.copy()
    model.load_state_dict(stored.read(tmp_path / "w.safetensors"), assign=True)
    plan = PruneWidth().plan(model, Context())
    assert plan.digest() == PruneWidth().plan(dit.model, Context()).digest()
    assert stored.place_of(model.blocks[0].mlp.fc1.weight)
    PruneWidth().rewrite(model, plan)
    assert trait_of(model.blocks[0].mlp, FeedForward).hidden == 96


def test_parameters_and_macs_fall_as_computed_by_hand(dit):
    """DiT tiny: 2 layers, width 32, 128 hidden units, 16 tokens, 2 images; each layer loses 32 units."""
    result = PruneWidth(share=0.25).apply(dit.copy(), Context(example=dit.inputs))
    assert result.before.parameter_count - result.after.parameter_count == 2 * 32 * (32 + 1 + 32)
    assert result.before.macs - result.after.macs == 2 * 2 * 16 * 2 * 32 * 32


def test_a_narrower_model_exports_runs_and_builds(dit, tmp_path):
    model = PruneWidth(share=0.5).apply(dit.copy(), Context()).model
    path = exported(model, dit.inputs, tmp_path)
    torch.testing.assert_close(in_onnxruntime(path, dit.inputs), dit.output(model), atol=1e-4, rtol=0)
    pytest.importorskip("tensorrt_rtx")
    assert (built(path, dit.inputs) / "engine.plan").stat().st_size > 1000
