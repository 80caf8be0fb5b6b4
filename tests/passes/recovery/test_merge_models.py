"""Several models in one: what each style answers like, what the merge starts from, and what it refuses."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from enginewright.ground.errors import ToolchainError
from enginewright.models.diffusion.dit import TINY
from enginewright.passes.contract import Context, Plan
from enginewright.passes.recovery.merge_models import MergeModels, mean_of
from enginewright.passes.recovery.styles import add_styles, one_hot, time_embeddings
from enginewright.passes.traits import TimeEmbedding, layers_of
from enginewright.targets.onnx_export import export_onnx
from tests.passes.conftest import SUBJECTS, randomise
from tests.passes.joint import JOINT

TINY_ERROR = 1e-12
"""What a difference of exactly 0 is reported as."""

FAST = {"batch": 1, "data": "calibration"}


def perturbed(model, seed, by=0.02):
    """A fine-tuned twin."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return twin


def world(subject, models, **more):
    """A context that knows these teachers by name."""
    return Context(calibration=[subject.inputs], original=subject.model, teacher_of=models.__getitem__, **more)


def answer(subject, model, **more):
    with torch.no_grad():
        result = model(**subject.inputs, **more)
    return result if isinstance(result, torch.Tensor) else result[0]


# Where a style goes


def test_time_embeddings_are_found(dit):
    assert time_embeddings(dit.model) == {"t_embedder": 32}
    for name in ("sd3", "flux"):
        assert list(time_embeddings(JOINT[name]().model)) == ["time_text_embed.timestep_embedder"]
    assert len(time_embeddings(SUBJECTS["diffusers_dit_sdpa"]().model)) == 2
    assert not list(layers_of(SUBJECTS["vit_sdpa"]().model, TimeEmbedding))


@pytest.mark.parametrize("make", [SUBJECTS["reference_dit"], SUBJECTS["diffusers_dit_sdpa"], *JOINT.values()])
def test_before_training_every_style_is_the_base_and_later_mixtures_are_those_of_the_table(make):
    subject = make()
    exact = answer(subject, subject.model)
    model = add_styles(subject.copy(), time_embeddings(subject.model), 3)
    styles = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    assert torch.equal(answer(subject, model, style=styles), exact)
    assert torch.equal(answer(subject, model), exact)

    with torch.no_grad():
        for path in time_embeddings(subject.model):
            model.get_submodule(path).style_mlp[2].weight.normal_()
    mixed = answer(subject, model, style=styles)
    assert not torch.allclose(mixed, exact, atol=1e-2)
    with torch.no_grad():
        for path in time_embeddings(subject.model):
            table = model.get_submodule(path).style_table
            table[0] = styles[1] @ table
    again = answer(subject, model, style=torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(again, mixed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answer(subject, model), answer(subject, model, style=torch.full((2, 3), 1 / 3)))


# Training


def test_teachers_that_equal_the_base_leave_it_bit_for_bit(dit):
    teachers = {"a": dit.model, "b": dit.copy()}
    result = MergeModels(teachers=("a", "b"), steps=3, lr=0.1, **FAST).apply(dit.copy(), world(dit, teachers))

    assert result.plan.facts.loss == [0, 0]
    for error in result.plan.facts.relative_error.values():
        assert set(error.values()) == {TINY_ERROR}
    assert set(result.plan.choice) == {"t_embedder"}
    for style in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.4, 0.6], [0.0, 1.0]])):
        assert torch.equal(answer(dit, result.model, style=style), dit.output(dit.model))
    assert result.after.parameter_count - result.before.parameter_count == 2 * 32 + 2 * (32 * 32 + 32)


@pytest.mark.parametrize("start", ["base", "mean"])
def test_two_teachers_are_nearer_in_their_styles_than_to_the_mean_of_their_weights(dit, start):
    teachers = {"base": dit.model, "other": perturbed(dit.model, 1, by=0.03)}
    step = MergeModels(teachers=("base", "other"), steps=60, lr=4e-3, start=start, **FAST)
    result = step.apply(dit.copy(), world(dit, teachers))

    errors = result.plan.facts.relative_error
    assert (errors["base"]["before"] == TINY_ERROR) is (start == "base")
    for number, (name, error) in enumerate(errors.items()):
        assert error["after"] < 0.5 * error["mean_of_weights"]
        wanted, found = (
            answer(dit, net, **more)
            for net, more in ((teachers[name], {}), (result.model, {"style": one_hot(number, 2)}))
        )
        far = answer(dit, result.model, style=one_hot(1 - number, 2))
        assert (found - wanted).norm() / wanted.norm() == pytest.approx(error["after"], rel=1e-3)
        assert (found - wanted).norm() < 0.5 * (far - wanted).norm()
    assert "to teacher 'other'" in result.plan.facts.notes[1]


def test_features_alone_can_be_left_out_and_count_otherwise(dit):
    teachers = {"a": perturbed(dit.model, 1), "b": perturbed(dit.model, 2)}
    losses = [
        MergeModels(teachers=("a", "b"), steps=1, features=weight, **FAST)
        .plan(dit.model, world(dit, teachers))
        .facts.loss[0]
        for weight in (0, 0.5)
    ]
    assert losses[1] > 1.1 * losses[0] > 0


def test_blocks_that_are_computed_again_see_the_same_style():
    """The time embeddings of this network lie inside its blocks."""
    subject = SUBJECTS["diffusers_dit_sdpa"]()
    teachers = {"a": perturbed(subject.model, 1), "b": perturbed(subject.model, 2)}
    plans = [
        MergeModels(teachers=("a", "b"), steps=4, lr=1e-3, recompute=again, **FAST).plan(
            subject.copy(), world(subject, teachers)
        )
        for again in (False, True)
    ]
    for name, array in plans[0].arrays.items():
        torch.testing.assert_close(plans[1].arrays[name], array, atol=1e-4, rtol=1e-3)


def test_a_run_that_was_stopped_ends_where_it_would_have(dit, tmp_path):
    teachers = {"a": perturbed(dit.model, 1), "b": perturbed(dit.model, 2)}

    class Stopped(Exception):
        pass

    def stop(step, total, text):
        if step == 4:
            raise Stopped

    step = MergeModels(teachers=("a", "b"), steps=6, lr=1e-3, checkpoint="run", checkpoint_every=2, **FAST)
    with pytest.raises(Stopped):
        step.plan(dit.model, world(dit, teachers, folder=tmp_path, say=stop))
    ended = step.plan(dit.model, world(dit, teachers, folder=tmp_path))
    whole = step.model_copy(update={"checkpoint": ""}).plan(dit.model, world(dit, teachers))
    assert ended.digest() == whole.digest()

    other = step.model_copy(update={"start": "mean"})
    with pytest.raises(ToolchainError, match="of another run: start"):
        other.plan(dit.model, world(dit, teachers, folder=tmp_path))


# What comes out


def merged(subject):
    teachers = {"a": perturbed(subject.model, 1), "b": perturbed(subject.model, 2)}
    step = MergeModels(teachers=("a", "b"), steps=5, lr=5e-3, **FAST)
    return step, step.plan(subject.model, world(subject, teachers))


def test_a_style_that_is_baked_in_is_that_style(dit):
    step, plan = merged(dit)
    model = step.rewrite(dit.copy(), plan)
    fixed = step.model_copy(update={"style": (0.3, 0.7)})
    baked = fixed.rewrite(dit.copy(), plan)

    wanted = answer(dit, model, style=torch.tensor([[0.3, 0.7]]))
    torch.testing.assert_close(dit.output(baked), wanted, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(dit.output(baked), answer(dit, model, style=torch.tensor([[1.0, 0.0]])), atol=1e-4)
    assert fixed.new_inputs(plan) == ()
    names = {name for name, _ in baked.named_parameters()}
    assert names == {name for name, _ in dit.model.named_parameters()}


def test_the_input_has_a_weight_for_each_style_and_stays_through_copies(dit):
    step, plan = merged(dit)
    (new,) = step.new_inputs(plan)
    assert (new.name, new.shape, new.default) == ("style", (2,), 0.5)
    model = copy.deepcopy(step.rewrite(dit.copy(), Plan.from_json(plan.as_json(), plan.arrays, by=step.declared)))
    torch.testing.assert_close(answer(dit, model, style=torch.full((2, 2), 0.5)), answer(dit, model))


def test_it_is_held_against_its_teachers_and_not_against_itself(dit):
    teachers = {"a": perturbed(dit.model, 1), "b": perturbed(dit.model, 2)}
    step = MergeModels(teachers=("a", "b"), steps=5, lr=5e-3, **FAST)
    context = world(dit, teachers)
    plan = step.plan(dit.model, context)
    intended = step.intended(dit.model, plan, context)
    answers = [dit.output(teacher) for teacher in teachers.values()]
    for number, wanted in enumerate(answers):
        torch.testing.assert_close(answer(dit, intended, style=one_hot(number, 2)), wanted)
    torch.testing.assert_close(answer(dit, intended), (answers[0] + answers[1]) / 2)
    rows = answer(dit, intended, style=torch.eye(2))
    torch.testing.assert_close(rows, torch.stack([answers[0][0], answers[1][1]]))
    baked = step.model_copy(update={"style": (0.0, 1.0)}).intended(dit.model, plan, context)
    torch.testing.assert_close(answer(dit, baked), answers[1])
    assert (answer(dit, step.rewrite(dit.copy(), plan)) - answer(dit, intended)).abs().max() > 1e-4


def test_rows_of_one_call_may_have_styles_of_their_own(dit):
    step, plan = merged(dit)
    model = step.rewrite(dit.copy(), plan)
    styles = torch.eye(2)
    both = answer(dit, model, style=styles)
    alone = torch.cat([answer(dit, model, style=styles[row : row + 1])[row : row + 1] for row in range(2)])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
    swapped = answer(dit, model, style=styles.flip(0))
    assert (both - swapped).flatten(1).norm(dim=1).min() > 1e-3


def test_weights_in_half_precision_take_the_style_too(dit):
    step, plan = merged(dit)
    half = step.rewrite(dit.copy(), plan).bfloat16()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    inputs = {**dit.inputs, "x": dit.inputs["x"].bfloat16(), "style": torch.tensor([[0.0, 1.0]])}
    with torch.no_grad():
        assert half(**inputs).isfinite().all()


def test_it_runs_in_onnx_runtime_with_its_style(dit, tmp_path):
    import onnxruntime

    step, plan = merged(dit)
    model = step.rewrite(dit.copy(), plan)
    example = {**dit.inputs, "style": torch.tensor([[0.0, 1.0], [0.5, 0.5]])}
    path = tmp_path / "m.onnx"
    dynamic = {name: {0: ("batch", 1, 8)} for name in example}
    export_onnx(model, example, dynamic=dynamic, outputs=["out"], path=path)
    session = onnxruntime.InferenceSession(path)
    for style in (example["style"], torch.eye(2)):
        call = {**example, "style": style}
        [found] = session.run(None, {name: tensor.numpy() for name, tensor in call.items()})
        torch.testing.assert_close(torch.from_numpy(found), answer(dit, model, style=style), atol=1e-4, rtol=1e-4)


# Teachers


def test_a_file_of_weights_is_a_teacher(dit, tmp_path):
    other = perturbed(dit.model, 1)
    weights = {name: tensor.contiguous() for name, tensor in other.state_dict().items()}
    save_file(weights, tmp_path / "o.safetensors")
    step = MergeModels(teachers=("base", "o.safetensors"), steps=2, **FAST)
    found = step.plan(dit.model, world(dit, {"base": dit.model}, folder=tmp_path))
    named = step.model_copy(update={"teachers": ("base", "o")})
    wanted = named.plan(dit.model, world(dit, {"base": dit.model, "o": other}))
    assert all(torch.equal(wanted.arrays[name], array) for name, array in found.arrays.items())

    moved = step.moved(lambda text: f"../{text}", lambda text: f"moved {text}")
    assert moved.teachers == ("moved base", "../o.safetensors")


def test_the_mean_of_weights(dit):
    twins = [perturbed(dit.model, seed) for seed in (1, 2)]
    mean = mean_of(twins)["blocks.0.attn.proj.weight"]
    first, second = (twin.blocks[0].attn.proj.weight for twin in twins)
    torch.testing.assert_close(mean.float(), (first + second).detach() / 2)


# What it refuses


def test_what_cannot_be_is_refused(dit, tmp_path):
    def planned(*teachers, **more):
        known = {"a": dit.model, "wider": randomise(type(dit.model)(replace(TINY, width=64))), "b": dit.model}
        MergeModels(teachers=teachers, **FAST, **more).plan(dit.model, world(dit, known, folder=tmp_path))

    with pytest.raises(ToolchainError, match="got 1 different teachers"):
        planned("a", "a")
    with pytest.raises(ToolchainError, match=r"'wider' is another network: .* is .*, in the model"):
        planned("a", "wider")
    with pytest.raises(ToolchainError, match=r"no file 'none.safetensors'"):
        planned("a", "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ToolchainError, match=r"'broken.safetensors' is not a whole"):
        planned("a", "broken.safetensors")
    save_file({"blocks": torch.ones(1)}, tmp_path / "strange.safetensors")
    with pytest.raises(ToolchainError, match=r"is another network: .* is not there"):
        planned("a", "strange.safetensors")
    with pytest.raises(ToolchainError, match="there are 2 teachers"):
        MergeModels(teachers=("a", "b"), style=(1.0,))


def test_a_network_without_timesteps_is_left_alone():
    subject = SUBJECTS["vit_sdpa"]()
    plan = MergeModels(teachers=("a", "b")).plan(subject.model, Context())
    assert plan.choice == {}
    assert "embeds a timestep" in plan.skipped[""]
    step = MergeModels(teachers=("a", "b"))
    assert step.new_inputs(plan) == ()
    assert step.rewrite(subject.model, plan) is subject.model
