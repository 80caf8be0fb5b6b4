from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Signature
from enginewright.models.vision import fit
from enginewright.passes.contract import Context
from enginewright.passes.dynamic.buckets import masks_for, stretches
from enginewright.passes.dynamic.reuse_blocks import ReuseBlocks
from enginewright.passes.dynamic.slice_width_by_timestep import SlicedLayer, SliceWidthByTimestep
from enginewright.passes.networks import networks_of
from enginewright.validation.inputs import draw
from tests.engines import built, exported, in_onnxruntime
from tests.passes.conftest import SUBJECTS
from tests.passes.joint import flux, sharing

TIMES = {"reference_dit": "t", "diffusers_dit_sdpa": "timestep"}


def sliced(subject, input="t", **parameters):
    step = SliceWidthByTimestep(**{"input": input, "steps": 8, "importance": "activation", **parameters})
    return step, step.apply(subject.copy(), Context(calibration=[subject.inputs], example=subject.inputs))


def masked(step, subject, plan):
    """The form that saves nothing: one network with all units, silent where the masks say so."""
    choice = {path: SlicedLayer(of=entry.of, kept=(tuple(range(entry.of)),)) for path, entry in plan.choice.items()}
    whole = replace(plan, choice=choice, facts=plan.facts.model_copy(update={"table": (0,) * len(plan.facts.table)}))
    return step.rewrite(subject.copy(), whole)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
@pytest.mark.parametrize("name", TIMES)
def test_cut_networks_are_the_masked_one_at_every_timestep(name, importance):
    subject, time = SUBJECTS[name](), TIMES[name]
    step, result = sliced(subject, time, importance=importance)
    reference = masked(step, subject, result.plan)
    full = 0
    for t in result.plan.facts.timesteps:
        subject.inputs[time] = torch.full((2,), t)
        wanted = subject.output(reference)
        torch.testing.assert_close(subject.output(result.model), wanted, atol=1e-5, rtol=0)
        full = max(full, (wanted - subject.output(subject.model)).abs().max())
    assert full > 1e-2
    subject.inputs[time] = torch.tensor([999.0, 0.0])  # rows of two networks
    torch.testing.assert_close(subject.output(result.model), subject.output(reference), atol=1e-5, rtol=0)
    assert len({*result.plan.facts.table}) == 3


@pytest.mark.parametrize("number", range(8))
def test_a_mask_is_silence_before_the_projection(dit, number):
    """By hand: zero columns of the untouched model at one timestep."""
    _, result = sliced(dit)
    dit.inputs["t"] = torch.full((2,), result.plan.facts.timesteps[number])
    model = dit.copy()
    for path in result.plan.choice:
        mask = result.plan.arrays[f"{path}.mask"][number].bool()
        layer = model.get_submodule(path)
        output = layer.proj if path.endswith("attn") else layer.fc2
        with torch.no_grad():
            output.weight.unflatten(1, (len(mask), -1))[:, ~mask] = 0
    torch.testing.assert_close(dit.output(result.model), dit.output(model), atol=1e-5, rtol=0)


def test_what_is_computed_keeps_to_the_share(dit):
    for share in (0.9, 0.5):
        _, result = sliced(dit, share=share)
        assert result.plan.facts.share_needed <= result.plan.facts.share_computed <= share
    table = torch.tensor(result.plan.facts.table)
    for path, entry in result.plan.choice.items():
        mask = result.plan.arrays[f"{path}.mask"].bool()
        assert mask.any(dim=1).all()
        for number, kept in enumerate(entry.kept):
            assert list(kept) == mask[table == number].any(dim=0).nonzero().flatten().tolist()
    blocks = 2 * 2 * 16 * (12 * 32 * 32 + 2 * 16 * 32)  # rows, layers, tokens
    assert result.before.macs - result.after.macs == pytest.approx(
        blocks * (1 - result.plan.facts.share_computed), rel=1e-3
    )


def test_a_share_of_all_changes_nothing_and_says_so(dit):
    _, result = sliced(dit, share=1.0)
    assert result.changed == ()
    assert set(result.plan.skipped.values()) == {"all of it is needed at every timestep"}
    assert result.before == result.after


def test_a_cut_network_exports_runs_and_builds(dit, tmp_path):
    _, result = sliced(dit)
    variant = next(iter(networks_of(result.model).values()))
    inputs = {**dit.inputs, "t": torch.tensor([999.0, 990.0])}
    path = exported(variant, inputs, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(in_onnxruntime(path, inputs), variant(**inputs), atol=1e-4, rtol=0)
    assert list(built(path, inputs).iterdir())


def test_the_cut_of_the_schedule_is_the_cheapest():
    rng = np.random.default_rng(0)
    masks, costs = rng.random((7, 5)) < 0.5, rng.random(5)

    def price(cuts):
        edges = [0, *cuts, 7]
        parts = [masks[a:b] for a, b in pairwise(edges)]
        return sum(len(part) * (part.any(axis=0) @ costs) for part in parts)

    table, total = stretches(masks, costs, 3)
    assert total == pytest.approx(min(price(cuts) for cuts in combinations(range(1, 7), 2)))
    assert total == pytest.approx(price([table.index(1), table.index(2)]))


def test_each_layer_keeps_its_worthiest_unit_whatever_the_share():
    worth = np.array([[1.0, 2.0, 9.0, 8.0], [3.0, 2.0, 9.0, 8.0]])
    masks = masks_for(worth, np.ones(4), np.array([0, 0, 1, 1]), 1, 0.01)
    assert masks.tolist() == [[False, True, True, False], [True, False, True, False]]


# What is left alone, and what a user can mend


def test_layers_left_alone_say_why(dit):
    _, result = sliced(dit, groups=3, exclude=("blocks.0.attn",))
    assert result.plan.skipped["blocks.0.attn"] == "excluded by 'blocks.0.attn'"
    assert result.plan.skipped["blocks.0.mlp"] == "its 128 hidden units do not fall into 3 groups"
    assert result.changed == ("blocks.1.attn",)


def test_a_model_without_layers_is_left_alone():
    plan = SliceWidthByTimestep().plan(nn.Linear(2, 2), Context(calibration=[{"t": torch.zeros(1)}]))
    assert (plan.choice, plan.skipped) == ({}, {})


def test_an_input_that_is_no_timestep_is_quoted(dit):
    with pytest.raises(ToolchainError, match="no input named 'time'"):
        sliced(dit, "time")
    with pytest.raises(ToolchainError, match=r"input 'x' has shape \(2, 4, 8, 8\); one a row is needed"):
        sliced(dit, "x")


def test_a_plan_for_another_model_is_refused(dit):
    step, result = sliced(dit)
    cut = next(iter(networks_of(result.model).values()))
    with pytest.raises(ToolchainError, match="the plan is for a layer of"):
        step.rewrite(cut, result.plan)


def test_scores_that_are_no_numbers_are_refused(dit):
    dit.model.blocks[0].attn.proj.weight.data.fill_(float("nan"))
    with pytest.raises(ToolchainError, match="is not finite"):
        sliced(dit)


def flux_calls(subject):
    """Calls of other content, at timesteps from 0 to 1."""
    calls = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        own = {
            name: value if name.endswith("_ids") else torch.randn(value.shape, generator=generator)
            for name, value in subject.inputs.items()
        }
        calls.append(own | {"timestep": torch.rand(2, generator=generator)})
    return calls


def test_flux_is_cut_to_the_masked_form_where_heads_and_hidden_units_share_a_projection():
    subject = flux()
    calls = flux_calls(subject)
    step = SliceWidthByTimestep(steps=5, importance="activation")
    result = step.apply(subject.copy(), Context(calibration=calls, signature=sharing("img_ids", "txt_ids")))
    assert list(result.plan.facts.timesteps) == [1, 0.75, 0.5, 0.25, 0]
    assert {"single_transformer_blocks.0", "single_transformer_blocks.0:ffn"} <= set(result.changed)
    reference = masked(step, subject, result.plan)
    for t in result.plan.facts.timesteps:
        subject.inputs["timestep"] = torch.full((2,), t)
        wanted = subject.output(reference)
        torch.testing.assert_close(subject.output(result.model), wanted, atol=1e-5, rtol=1e-5)
        assert (wanted - subject.output(subject.model)).abs().max() > 1e-3
    subject.inputs["timestep"] = torch.tensor([1.0, 0.0])  # rows of two networks, which share the position ids
    torch.testing.assert_close(subject.output(result.model), subject.output(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TIMES)
def test_the_timestep_is_found_by_its_name(name):
    subject = SUBJECTS[name]()
    _, result = sliced(subject, "")
    assert result.plan.facts.input == TIMES[name]
    reused = ReuseBlocks(steps=4).plan(subject.model, Context(calibration=[subject.inputs], example=subject.inputs))
    assert reused.facts.input == TIMES[name] if reused.choice else reused.skipped


def test_a_model_without_a_timestep_is_refused_with_its_inputs():
    subject = SUBJECTS["vit_sdpa"]()
    with pytest.raises(ToolchainError, match="no input of the model is known to hold a timestep") as caught:
        sliced(subject, "")
    assert "its inputs: pixel_values; set input to one of them" in str(caught.value)


def test_layers_that_run_on_groups_of_a_rows_tokens_are_left_alone():
    torch.manual_seed(0)
    model = fit.build(fit.TINY).eval()
    calls = [{k: torch.from_numpy(v) for k, v in draw(fit.inputs(fit.TINY), seed=i).items()} for i in range(3)]
    context = Context(calibration=calls, example=calls[0], signature=Signature(fit.inputs(fit.TINY)))
    result = SliceWidthByTimestep(importance="activation", steps=4, buckets=2, groups=4).apply(model, context)
    assert result.changed
    over_all = (".global_blocks.", ".read_condition.")  # one row for each of a call
    assert all(any(part in path for part in over_all) or path == "previous_mlp" for path in result.changed)
    told = result.plan.skipped["trunk.stages.0.local_blocks.0.attn"]
    assert told == "it runs on 16 rows where a call has 4, and each row of a call has its own timestep"
    result.model(**calls[1])
