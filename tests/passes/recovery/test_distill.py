"""Distillation as a pass: what it changes, what it leaves, and what it refuses."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.recovery.distill import Distill
from enginewright.passes.traits import BlockStack, FeedForward, HeadedAttention, layer_at, layers_of
from tests.passes.conftest import SUBJECTS

REFERENCE = pytest.mark.parametrize("subject", ["reference_dit", "vit_sdpa", "bert_sdpa"], indirect=True)
EVERY = {"features": 1.0, "attention": 1.0, "relation": 1.0}


def pushed(subject, by=0.02):
    """A copy whose weights are a little off."""
    model = subject.copy()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn_like(parameter)
    return model


def taught(subject, **more):
    return Context(calibration=[subject.inputs], original=subject.model, **more)


def structure(model):
    return [(path, type(module)) for path, module in model.named_modules()], {
        name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()
    }


# What it changes


@REFERENCE
def test_a_pushed_student_comes_back(subject):
    student = pushed(subject)
    before, shape = subject.output(student), structure(student)

    result = Distill(steps=30, batch=1, lr=3e-3).apply(student, taught(subject))

    exact = subject.output(subject.model)
    left = (subject.output(result.model) - exact).norm() / (before - exact).norm()
    assert left < 0.6
    assert structure(result.model) == shape
    error = result.plan.facts.relative_error
    assert error["after"] < error["before"] * 0.6
    assert result.plan.facts.loss[1] < result.plan.facts.loss[0]
    assert result.before == result.after


@REFERENCE
def test_a_student_that_equals_its_teacher_stays_as_it_is(subject):
    plan = Distill(steps=3, batch=2, lr=0.1, **EVERY).plan(subject.copy(), taught(subject))

    assert plan.choice == {}
    assert plan.arrays == {}
    assert plan.facts.loss == [0, 0]
    owners = {name.rpartition(".")[0] for name, p in subject.model.named_parameters() if p.requires_grad}
    assert {plan.skipped[path] for path in owners} == {"training left its weights as they were"}


@REFERENCE
def test_every_loss_teaches_by_itself(subject):
    student = pushed(subject)
    losses = {}
    for name in ("features", "attention", "relation"):
        step = Distill(steps=12, batch=1, lr=2e-3, output=0, **{name: 1.0})
        plan = step.plan(student, taught(subject))
        losses[name] = plan.facts.loss
        assert plan.facts.aligned == {"the original": {name: 2}}
    if subject.paths[0] == "blocks.0.attn":  # weights of features follow the output loss, so theirs is no measure
        losses.pop("features")
    assert all(last < 0.8 * first for first, last in losses.values()), losses


def test_a_pruned_student_learns(dit):
    student = dit.copy()
    for _, layer in list(layers_of(student, FeedForward)):
        layer.keep_hidden(range(layer.hidden * 3 // 4))
    for path in dit.paths:
        layer_at(student, path, HeadedAttention).keep_heads([0, 1, 2])
    exact, before, shape = dit.output(dit.model), dit.output(student), structure(student)

    result = Distill(steps=40, batch=1, lr=3e-3, **EVERY).apply(student, taught(dit))

    assert (dit.output(result.model) - exact).norm() < (before - exact).norm() / 3
    assert structure(result.model) == shape


def test_a_student_with_fewer_blocks_learns(dit):
    deep = copy.deepcopy(dit.model)
    deep.blocks.extend(copy.deepcopy(block) for block in dit.model.blocks)
    student = copy.deepcopy(deep)
    next(stack for _, stack in layers_of(student, BlockStack)).keep_blocks([0, 3])

    plan = Distill(steps=30, batch=1, lr=3e-3, features=1, attention=1).plan(
        student, Context(calibration=[dit.inputs], original=deep)
    )

    assert plan.facts.aligned == {"the original": {"features": 2, "attention": 2}}
    assert plan.facts.relative_error["after"] < plan.facts.relative_error["before"] / 2


def test_adapters_change_matrices_by_their_rank_and_nothing_else(dit):
    student = pushed(dit)
    plan = Distill(steps=10, batch=1, lr=1e-2, rank=2).plan(student, taught(dit))

    assert plan.choice
    assert "only the matrices of linear layers have adapters" in plan.skipped["x_embedder.proj"]
    for path, entry in plan.choice.items():
        assert entry.weights == ("weight",)
        values = torch.linalg.svdvals((plan.arrays[f"{path}.weight"] - student.get_submodule(path).weight).double())
        assert values[1] > 1e-3 * values[0], f"{path}: the second direction is unused"
        assert values[2] < 1e-4 * values[0]
    assert structure(Distill().rewrite(copy.deepcopy(student), plan)) == structure(student)


def test_only_what_was_asked_for_is_trained(dit):
    student = pushed(dit)
    result = Distill(steps=3, batch=1, train=("blocks.1.*", "final_layer.*")).apply(copy.deepcopy(student), taught(dit))

    assert {path.partition(".")[0] for path in result.changed} == {"blocks", "final_layer"}
    assert "blocks.1.attn.qkv" in result.changed
    assert "matches none of train" in result.plan.skipped["blocks.0.attn.qkv"]
    assert "ask for no gradient" in Distill(steps=1).plan(student, taught(dit)).skipped[""]
    changed = {name for name, p in result.model.named_parameters() if not torch.equal(p, student.get_parameter(name))}
    assert {name.rpartition(".")[0] for name in changed} == set(result.changed)


def test_tied_weights_stay_tied(calm):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    teacher, student = Tied(), Tied()
    context = Context(calibration=[{"x": torch.randn(8, 4)}], original=teacher)
    result = Distill(steps=5, lr=1e-2).apply(student, context)

    assert result.model.a.weight is result.model.b.weight
    assert torch.equal(result.model.b.weight, result.plan.arrays["a.weight"])


def test_weights_in_16_bits_come_back_in_16_bits(calm):
    teacher = nn.Linear(4, 4)
    student = nn.Linear(4, 4).bfloat16()
    context = Context(calibration=[{"input": torch.randn(8, 4)}], original=teacher)
    plan = Distill(steps=20, lr=1e-2).plan(student, context)

    assert plan.arrays["weight"].dtype == torch.bfloat16
    assert plan.facts.relative_error["after"] < plan.facts.relative_error["before"]


# Ways to compute


def test_computing_blocks_again_gives_the_same_weights(dit):
    student = pushed(dit)
    plans = [
        Distill(steps=3, batch=1, recompute=recompute, **EVERY, stop="angle").plan(student, taught(dit))
        for recompute in (False, True)
    ]
    assert plans[0].arrays.keys() == plans[1].arrays.keys()
    assert all(torch.equal(plans[0].arrays[name], plans[1].arrays[name]) for name in plans[0].arrays)


def test_bfloat16_products_teach_too(dit):
    student = pushed(dit)
    plain, rough = (
        Distill(steps=15, batch=1, lr=3e-3, autocast=autocast).plan(student, taught(dit)) for autocast in (False, True)
    )
    assert rough.facts.relative_error["after"] < rough.facts.relative_error["before"] / 2
    assert plain.digest() != rough.digest()


def test_a_plan_comes_back_from_disk(dit, tmp_path):
    student = pushed(dit)
    step = Distill(steps=2, batch=1)
    plan = step.plan(student, taught(dit))
    plan.write(tmp_path / "01-distill.json")

    one = step.rewrite(copy.deepcopy(student), plan)
    two = step.rewrite(copy.deepcopy(student), Plan.read(tmp_path / "01-distill.json", step.declared))
    assert torch.equal(dit.output(one), dit.output(two))
    json.loads(plan.as_json())


def test_the_global_random_state_and_both_models_are_left_alone(dit):
    student = pushed(dit)
    student.train()
    held = [(p, p.clone()) for model in (student, dit.model) for p in model.parameters()]
    state = torch.get_rng_state()

    Distill(steps=2, batch=1, rank=2, **EVERY).plan(student, taught(dit))

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, old) and p.grad is None for p, old in held)
    assert student.training
    assert not dit.model.training
    assert not any(module._forward_hooks for module in (*student.modules(), *dit.model.modules()))


# Where calls come from


def test_generated_calls_are_preferred_and_said(dit):
    asked = []

    def draw(count, seed):
        asked.append((count, seed))
        return [dit.inputs] * count

    context = taught(dit, draw=draw)
    assert Distill(steps=1, batch=2).plan(pushed(dit), context).facts.data == "generated"
    assert asked == [(32, 0)]
    assert Distill(steps=1, data="calibration").plan(pushed(dit), context).facts.data == "calibration"
    assert Distill(steps=1).plan(pushed(dit), taught(dit)).facts.data == "calibration"


def test_a_files_calls_are_those_of_the_context(dit):
    plan = Distill(steps=1, data="more.safetensors").plan(
        pushed(dit), Context(original=dit.model, calls_in={"more.safetensors": [dit.inputs]}.__getitem__)
    )
    assert plan.facts.data == "file"


def test_another_teacher_pulls_its_way(dit):
    student, other = pushed(dit), pushed(dit, by=0.05)
    context = taught(dit, teacher_of={"dit:other": other}.__getitem__)

    def distance(**settings):
        result = Distill(steps=25, batch=1, lr=3e-3, **settings).apply(copy.deepcopy(student), context)
        return float((dit.output(result.model) - dit.output(other)).norm())

    teachers = ({"model": "dit:other", "output": 1, "relation": 1},)
    assert distance(output=0, teachers=teachers) < distance() / 2


def test_paths_move_with_the_recipe():
    step = Distill(data="calls.safetensors", checkpoint="kept", teachers=({"model": "hf:there", "output": 1},))
    moved = step.moved("../{}".format, lambda text: text.replace("there", "../there"))
    assert (moved.data, moved.checkpoint, moved.teachers[0].model) == ("../calls.safetensors", "../kept", "hf:../there")
    assert Distill().moved("../{}".format, str) == Distill()


# What it refuses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"aligned": (0.6, 0.3)}, "aligned is .0.6, 0.3.; it is two shares of the depth"),
        ({"lr": 0}, "lr is 0; it must be more than 0"),
        ({"teachers": ({"model": "x", "weight": 1},)}, "'teachers.0.weight'"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ToolchainError, match=message):
        Distill(**settings)


@pytest.mark.parametrize(
    ("settings", "without", "message"),
    [
        ({}, "original", "learns from the original model, and there is none here"),
        ({}, "calibration", "data = 'calibration' gives none"),
        ({"data": "generated"}, "", "the model's source cannot make calls"),
        ({"data": "x.safetensors"}, "", "calls of 'x.safetensors' cannot be read here"),
        ({"teachers": ({"model": "dit:other", "output": 1},)}, "", "teacher 'dit:other' cannot be loaded here"),
        ({"output": 0}, "", "every loss of distill weighs 0"),
        ({"train": ("block.*",)}, "", r"train 'block\.\*' matches no module with weights"),
        ({"train": ("",)}, "", "nothing to train: its weights are constants"),
        ({"features": 1, "aligned": (0.1, 0.2)}, "", "features of the student and of the original cannot be compared"),
    ],
)
def test_what_cannot_be_done_is_refused(dit, settings, without, message):
    context = {"calibration": [dit.inputs], "original": dit.model}
    context.pop(without, None)
    with pytest.raises(ToolchainError, match=message):
        Distill(steps=1, **settings).plan(pushed(dit), Context(**context))


def test_features_of_another_width_and_unreadable_maps_are_refused_by_name(dit):
    from enginewright.models.diffusion.dit import Config, DiT

    wide = DiT(Config(depth=2, width=48, heads=4, side=8, classes=4)).eval()
    context = Context(calibration=[dit.inputs], original=wide)
    with pytest.raises(ToolchainError, match=r"features are \[\(2, 16, 32\)\] and the teacher's \[\(2, 16, 48\)\]"):
        Distill(steps=1, features=1).plan(dit.copy(), context)
    assert Distill(steps=1, relation=1).plan(pushed(dit), context).choice

    eager = SUBJECTS["vit_eager"]()
    with pytest.raises(ToolchainError, match="it does not call scaled_dot_product_attention"):
        Distill(steps=1, attention=1).plan(pushed(eager), taught(eager))


def test_outputs_of_another_shape_are_refused(calm):
    context = Context(calibration=[{"input": torch.randn(2, 4)}], original=nn.Linear(4, 3))
    with pytest.raises(ToolchainError, match=r"the original gives outputs \[\(2, 3\)\], the student \[\(2, 4\)\]"):
        Distill(steps=1).plan(nn.Linear(4, 4), context)


def test_weights_without_values_are_refused(dit):
    with pytest.raises(ToolchainError, match="meta device, which holds no values"):
        Distill(steps=1).plan(dit.copy().to("meta"), taught(dit))


def test_a_plan_for_another_width_is_refused(dit):
    plan = Distill(steps=1, batch=1).plan(pushed(dit), taught(dit))
    narrow = dit.copy()
    next(layer for _, layer in layers_of(narrow, FeedForward)).keep_hidden(range(8))
    with pytest.raises(ToolchainError, match=r"the plan is for a weight of shape \(128, 32\); this one has \(8, 32\)"):
        Distill().rewrite(narrow, plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_is_not_there_is_refused(dit):
    with pytest.raises(UnavailableError, match="device is 'cuda'"):
        Distill(steps=1, device="cuda").plan(pushed(dit), taught(dit))


# In the pipeline


def test_the_pipeline_offers_calls_files_and_teachers(tmp_path):
    from enginewright.calibration import CALIBRATION_SEED, TRAINING_SEED, VALIDATION_SEED
    from enginewright.pipeline import Run
    from enginewright.progress import Progress
    from enginewright.recipe import make
    from enginewright.state import first_state

    save_file(
        {"x": torch.randn(4, 4, 8, 8), "t": torch.rand(4), "y": torch.zeros(4, dtype=torch.long)},
        tmp_path / "c.safetensors",
    )
    content = {"model": "dit:tiny", "seed": 3, "steps": [{"pass": "distill"}]}
    run = Run(make(content, folder=tmp_path), Progress(quiet=True))
    context = first_state(run.recipe, run.model, progress=run.progress, trust_code=False).context

    drawn = context.draw(3, 5)
    assert len(drawn) == 3
    assert torch.equal(drawn[1]["x"], context.draw(1, 6)[0]["x"])
    assert not any(torch.equal(a["x"], b["x"]) for a in drawn for b in context.calibration)
    assert max(CALIBRATION_SEED, VALIDATION_SEED) + 10_000 < TRAINING_SEED
    assert [tuple(call["x"].shape) for call in context.calls_in("c.safetensors")] == [(2, 4, 8, 8)] * 2
    assert context.folder == tmp_path
    other = context.teacher_of("dit:tiny")
    assert other is not run.model.module
    assert type(other) is type(run.model.module)

    from_file = make({**content, "calibration": {"file": "c.safetensors"}}, folder=tmp_path)
    assert first_state(from_file, run.model, progress=run.progress, trust_code=False).context.draw is None


def test_an_artifact_can_teach(artifact):
    from enginewright.passes.quantization.linear import QuantizedLinear
    from enginewright.recipe import make
    from enginewright.teachers import teacher_of

    module = teacher_of(artifact.name, make({"model": "dit:tiny"}, folder=artifact.parent))
    assert any(isinstance(part, QuantizedLinear) for part in module.modules())
