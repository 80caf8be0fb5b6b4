import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim, InputSpec, Signature
from enginewright.models.diffusion.dit import Config, DiT
from enginewright.passes.contract import Context, Plan, macs
from enginewright.passes.dynamic.reuse_blocks import ReuseBlocks, ReusedBlocks
from enginewright.passes.networks import Networks, networks_of
from enginewright.passes.specialize.merge_guidance import MergeGuidance
from enginewright.targets.pytorch_engine import flat
from tests.engines import built, exported, in_onnxruntime
from tests.passes.conftest import SUBJECTS, Subject, randomise

TIMES = {"deep_dit": "t", "diffusers_dit_sdpa": "timestep"}


def deep_dit() -> Subject:
    config = Config(depth=6, width=32, heads=4, side=8, classes=4)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.tensor([3, 700]), "y": torch.tensor([0, 3])}
    return Subject(model=randomise(DiT(config)), inputs=inputs, paths=())


def subject_of(name):
    return deep_dit() if name == "deep_dit" else SUBJECTS[name]()


@pytest.fixture
def deep(calm):
    return deep_dit()


def reusing(subject, input="t", calibrated=True, **parameters):
    step = ReuseBlocks(**{"input": input, "steps": 6, **parameters})
    calibration = [subject.inputs] if calibrated else []
    return step, step.apply(subject.copy(), Context(calibration=calibration, example=subject.inputs))


def a_run(model, subject, time, timesteps, rows=2):
    """The pictures at each step of a walk, each of which rests on the output before."""
    inputs = {name: value[:rows] for name, value in subject.inputs.items()}
    image = next(name for name in inputs if inputs[name].ndim == 4)
    found = []
    for t in timesteps:
        inputs[time] = torch.full((rows,), t)
        with torch.no_grad():
            out = model(**inputs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        inputs[image] = inputs[image] - 0.2 * out[:, :4]
        found.append(inputs[image])
    return found


class EveryBlock(nn.Module):
    """Saves nothing: all blocks run, and at a reusing step the last one's output is replaced."""

    def __init__(self, model, path, blocks, table):
        super().__init__()
        self.model, self.table, self.step = model, table, 0
        stack = model.get_submodule(path)
        stack[blocks[0]].register_forward_pre_hook(self.note, with_kwargs=True)
        stack[blocks[-1]].register_forward_hook(self.replace)

    def note(self, _, args, named):
        self.before = named.get("hidden_states", args[0] if args else None)

    def replace(self, _, args, output):
        if self.table[self.step]:
            return self.before + self.kept
        self.kept = output - self.before
        return None

    def forward(self, **inputs):
        out = self.model(**inputs)
        self.step += 1
        return out


@pytest.mark.parametrize("parameters", [{}, {"interval": 3}, {"whole": (0, 1, 4)}])
@pytest.mark.parametrize("name", TIMES)
def test_a_run_is_that_of_all_blocks_with_the_contribution_replaced(name, parameters):
    subject, time = subject_of(name), TIMES[name]
    _, result = reusing(subject, time, **parameters)
    facts, ((path, entry),) = result.plan.facts, result.plan.choice.items()
    reference = EveryBlock(subject.copy(), path, entry.blocks, facts.table)
    found, wanted = (a_run(model, subject, time, facts.timesteps) for model in (result.model, reference))
    plain = a_run(subject.model, subject, time, facts.timesteps)
    for step, (got, want, base) in enumerate(zip(found, wanted, plain, strict=True)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert torch.equal(got, base) == (1 not in facts.table[: step + 1])
    assert (found[-1] - plain[-1]).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "condition"), [("deep_dit", "y"), ("diffusers_dit_sdpa", "class_labels")])
def test_guided_rows_reuse_each_what_is_its_own(name, condition):
    subject, time = subject_of(name), TIMES[name]
    _, result = reusing(subject, time)
    with_it, without = copy.deepcopy(result.model), copy.deepcopy(result.model)
    step = MergeGuidance(condition=condition, none=4, scale=3.0, fixed=True)
    guided = step.apply(result.model, Context(calibration=[subject.inputs], example=subject.inputs)).model
    assert [state.shape[0] for state in guided.program.states] == [2]

    def two_runs(**inputs):
        none = {**inputs, condition: torch.full_like(inputs[condition], 4)}
        given, plain = (flat(model(**call))[0] for model, call in ((with_it, inputs), (without, none)))
        return plain + 3 * (given - plain)

    times = result.plan.facts.timesteps
    for got, want in zip(a_run(guided, subject, time, times), a_run(two_runs, subject, time, times), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    both = {**subject.inputs, time: torch.full((2,), times[1])}
    _, short = networks_of(guided)
    kept = torch.zeros(2, *guided.program.states[0].shape)
    with torch.no_grad():
        assert flat(networks_of(guided)[short](**both, reused=kept))[0].shape == flat(guided(**both))[0].shape


def test_steps_and_blocks_are_those_asked_for(deep):
    _, result = reusing(deep, interval=3, blocks=(1, 4))
    assert list(result.plan.facts.table) == [0, 1, 1, 0, 1, 1]
    assert result.plan.choice == {"blocks": ReusedBlocks(blocks=(1, 2, 3, 4), of=6)}
    assert list(reusing(deep, whole=(0, 1, 4))[1].plan.facts.table) == [0, 0, 1, 1, 0, 1]


def test_without_calibration_the_middle_is_left_out(deep):
    _, result = reusing(deep, calibrated=False, share=1 / 3)
    assert result.plan.choice["blocks"].blocks == (2, 3)
    assert result.plan.facts.chosen == "the middle"


@pytest.mark.parametrize("still", [0, 3])
def test_blocks_that_do_not_change_with_the_timestep_are_those_left_out(deep, still):
    with torch.no_grad():
        for number in (still, still + 1):
            deep.model.blocks[number].adaLN_modulation[1].weight.zero_()
            deep.model.blocks[number].attn.proj.weight.zero_()
            deep.model.blocks[number].mlp.fc2.weight.zero_()  # only its bias is left to add, the same at any timestep
    _, result = reusing(deep, share=1 / 3)
    assert result.plan.choice["blocks"].blocks == (still, still + 1)
    assert result.plan.facts.changes[f"{still} to {still + 1}"] < 1e-5
    assert len(result.plan.facts.changes) == 5


def test_multiply_accumulates_are_counted_by_step_and_over_the_run(deep):
    _, result = reusing(deep, interval=3, blocks=(2, 3))
    block = 2 * (16 * 12 * 32 * 32 + 2 * 16 * 16 * 32 + 6 * 32 * 32)  # two rows: projections, attention, modulation
    found = result.plan.facts.macs
    assert found["whole_step"] == macs(deep.model, deep.inputs) == result.before.macs
    assert found["reusing_step"] == found["whole_step"] - 2 * block
    assert found["run"] == 2 * found["whole_step"] + 4 * found["reusing_step"]
    assert found["run_of_whole_steps"] == 6 * found["whole_step"]
    assert result.after.macs == round(found["run"] / 6)
    assert result.after.parameter_count == result.before.parameter_count  # both forms share them


def test_an_interval_of_1_changes_nothing_and_says_so(deep):
    for parameters in ({"interval": 1}, {"whole": tuple(range(6))}):
        _, result = reusing(deep, **parameters)
        assert result.changed == ()
        assert result.plan.skipped == {"blocks": "every step runs whole: there is nothing to reuse"}
        assert torch.equal(deep.output(result.model), deep.output(deep.model))
        assert result.before == result.after


# What is kept from call to call


def test_only_a_run_along_the_schedule_reuses(deep):
    _, result = reusing(deep)
    times, model = result.plan.facts.timesteps, result.model

    def whole(t, rows=2, y=None):
        inputs = {name: value[:rows] for name, value in deep.inputs.items()}
        inputs |= {"t": t if isinstance(t, torch.Tensor) else torch.full((rows,), t)} | (
            {"y": y} if y is not None else {}
        )
        with torch.no_grad():
            return torch.equal(model(**inputs), deep.model(**inputs))

    assert [whole(t) for t in times] == [True, False, True, False, True, False]
    assert [whole(times[0]), whole(times[1], rows=1)] == [True, True]  # another shape
    assert [whole(times[k]) for k in (0, 3, 4, 5)] == [True, True, True, False]  # a step was left out
    assert [whole(times[k]) for k in (0, 0, 1, 1, 2, 2, 3)] == [True] * 7  # guidance in two calls
    assert [whole(times[0]), whole(torch.tensor([times[1], times[0]])), whole(times[1])] == [True] * 3
    assert [whole(times[k]) for k in (0, 1, 0, 1)] == [True, False, True, False]


# Engines


def test_both_forms_export_run_and_build(deep, tmp_path):
    _, result = reusing(deep)
    whole, short = networks_of(result.model).values()
    inputs = {**deep.inputs, "t": torch.tensor([999.0, 999.0])}
    with torch.no_grad():
        output, given = whole(**inputs)
        later = {**inputs, "t": torch.tensor([800.0, 800.0]), "reused": given}
        wanted = short(**later)
    for name, model, call, want in (("whole", whole, inputs, output), ("short", short, later, wanted)):
        (tmp_path / name).mkdir()
        outputs = ("y", "reused") if name == "whole" else ("y",)
        path = exported(model, call, tmp_path / name, outputs)
        torch.testing.assert_close(in_onnxruntime(path, call), want, atol=1e-4, rtol=0)
        assert list(built(path, call).iterdir())


# What is left alone, and what a user can mend


def test_a_block_that_must_stay_is_never_left_out():
    subject = SUBJECTS["diffusers_dit_sdpa"]()
    _, result = reusing(subject, "timestep", share=1.0)
    assert result.plan.choice["transformer_blocks"].blocks == (1,)
    with pytest.raises(ToolchainError, match=r"block transformer_blocks\.0 must stay: the output layer reads"):
        reusing(subject, "timestep", blocks=(0, 1))


class Pairs(nn.Module):
    """Blocks that give two streams."""

    def __init__(self, wide):
        super().__init__()
        self.wide = wide
        self.blocks = nn.ModuleList([Pair(wide) for _ in range(2)])

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
            x = x if self.wide else x[0]
        return x


class Pair(nn.Module):
    def __init__(self, wide):
        super().__init__()
        self.wide = wide
        self.attn = self.mlp = nn.Identity()

    def forward(self, x):
        return torch.cat([x, x], dim=1) if self.wide else (x, x)


@pytest.mark.parametrize(
    ("wide", "reason"),
    [
        (False, "its blocks give something else than one stream each, once a call"),
        (True, "its blocks change the shape"),
    ],
)
def test_stacks_that_are_left_alone_say_why(wide, reason):
    call = {"x": torch.randn(2, 3, 4), "t": torch.zeros(2)}
    result = ReuseBlocks().apply(Pairs(wide), Context(example=call))
    assert (result.changed, list(result.plan.skipped)) == ((), ["blocks"])
    assert result.plan.skipped["blocks"].startswith(reason)


def test_a_model_without_stacks_and_an_excluded_one_are_left_alone(deep):
    assert ReuseBlocks().plan(nn.Linear(2, 2), Context()).skipped == {"": "no family knows a stack of blocks in it"}
    _, result = reusing(deep, exclude=("blocks",))
    assert result.plan.skipped == {"blocks": "excluded by 'blocks'"}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"input": "time"}, "no input named 'time'"),
        ({"input": "x"}, r"input 'x' has shape \(2, 4, 8, 8\); one a row is needed"),
        ({"whole": (1, 2)}, r"whole is \(1, 2\); steps rise from 0, the first, to at most 5"),
        ({"whole": (0, 6)}, r"whole is \(0, 6\); steps rise"),
        ({"whole": (0, 3, 2)}, r"whole is \(0, 3, 2\); steps rise"),
        ({"blocks": (4, 6)}, "blocks are 4 to 6; the stack has 0 to 5"),
        ({"blocks": (4, 2)}, "blocks are 4 to 2"),
        ({"timesteps": (9.0, 5.0, 9.0)}, "timestep 9 stands twice in the schedule"),
        ({"exclude": ("block",)}, "exclude 'block' matches no stack of blocks"),
    ],
)
def test_what_a_user_can_mend_is_quoted(deep, parameters, message):
    with pytest.raises(ToolchainError, match=message):
        reusing(deep, **{"input": "t", **parameters})


def test_a_call_to_look_at_and_finite_values_are_needed(deep):
    with pytest.raises(ToolchainError, match="looks at one call of the model and got none"):
        ReuseBlocks().plan(deep.model, Context())
    deep.model.blocks[2].attn.proj.weight.data.fill_(float("nan"))
    with pytest.raises(ToolchainError, match="contribution of its blocks is not finite"):
        reusing(deep)


def test_a_plan_for_another_stack_is_refused(deep):
    step, result = reusing(deep)
    plan = Plan(choice={"blocks": ReusedBlocks(blocks=(1,), of=7)}, facts=result.plan.facts)
    with pytest.raises(ToolchainError, match="the plan is for a stack of 7 blocks; this has 6"):
        step.rewrite(deep.copy(), plan)


def test_the_two_forms_are_one_module(deep):
    _, result = reusing(deep)
    assert isinstance(result.model, Networks)
    assert not result.model.training


def test_a_stream_that_grows_with_the_picture_is_not_reused_unless_the_picture_has_one_size():
    rows, side = Dim(name="batch", low=1, typical=2, high=8), Dim(name="height", low=4, typical=8, high=16)

    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(list(deep_dit().model.blocks))

        def forward(self, x, t):
            c = torch.zeros(len(x), 32) + t[:, None] / 1000
            for block in self.blocks:
                x = block(x, c)
            return x

    call = {"x": torch.randn(2, 8, 32), "t": torch.tensor([3.0, 700.0])}
    inputs = (InputSpec(name="x", shape=(rows, side, 32)), InputSpec(name="t", shape=(rows,)))
    open_size = Context(example=call, signature=Signature(inputs))
    plan = ReuseBlocks(steps=4).plan(Growing().eval(), open_size)
    assert plan.choice == {}
    assert "its stream changes its shape with height" in plan.skipped["blocks"]
    one_size = Context(example=call, signature=Signature((replace(inputs[0], shape=(rows, 8, 32)), inputs[1])))
    assert ReuseBlocks(steps=4).plan(Growing().eval(), one_size).choice
