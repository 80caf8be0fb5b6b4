"""Passes on models of ours that are called in unusual ways: with a state, on groups of rows, for whole numbers alone.

Each case is one that failed with a traceback; all pairs of a pass and a model run with the mark ``matrix``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from enginewright import catalog, sources
from enginewright.calibration import tensors
from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, macs
from enginewright.passes.kernel.surgery import share
from enginewright.passes.networks import program_of
from enginewright.sources.contract import Model
from enginewright.targets.pytorch_engine import flat


def context_of(model: Model) -> Context:
    calls = tensors(model.batches(2, 3))
    return Context(calibration=calls, example=calls[0], original=model.module)


def settings(name: str, **more: Any) -> dict[str, Any]:
    return {"steps": 1, "batch": 1, **more} if name == "distill" else more


@pytest.mark.parametrize(
    "model",
    ["vevo-decoder", "vevo-flow", "vevo-tokenizers", "csd_var-transformer", "csd_var-quantizer", "csd_var-text"],
)
def test_half_precision_meets_states_rotary_tables_and_whole_numbers(model: str) -> None:
    loaded = sources.load(f"{model}:tiny")
    context = context_of(loaded)
    result = catalog.pass_class("convert_dtype")(dtype="float16").apply(share(loaded.module), context)
    assert result.changed
    with torch.no_grad():
        for call in context.calibration:
            assert all(each.isfinite().all() for each in flat(result.model(**call)) if each.is_floating_point())


@pytest.mark.parametrize(
    ("name", "model", "more", "said"),
    [
        ("cut_after", "vevo-flow", {}, "cannot be called any more when it is cut: AttributeError"),
        ("cut_after", "vevo-decoder", {}, "cannot be called any more when it is cut: ValueError"),
        ("distill", "vevo-tokenizers", {}, "gives whole numbers alone"),
        ("fix_inputs", "vevo-decoder", {"inputs": {"position": 0}}, "says where in its sequence a call goes on"),
        (
            "fix_inputs",
            "vevo-decoder",
            {"inputs": {"ids": 1}},
            "position would be left, which all rows of a call share",
        ),
        ("fix_inputs", "styleswin", {"inputs": {"z": 0.0}}, "every input is bound"),
    ],
)
def test_what_cannot_be_done_is_said(name: str, model: str, more: dict[str, Any], said: str) -> None:
    loaded = sources.load(f"{model}:tiny")
    with pytest.raises(ToolchainError, match=said):
        catalog.pass_class(name)(**settings(name, **more)).apply(share(loaded.module), context_of(loaded))


@pytest.mark.parametrize("model", ["tnt", "fit"])
def test_heads_that_run_on_groups_of_rows_have_no_strength_for_each(model: str) -> None:
    loaded = sources.load(f"{model}:tiny")
    context = context_of(loaded)
    steered = catalog.pass_class("perturb_heads")()
    result = steered.apply(share(loaded.module), context)
    left = {path for path, reason in result.plan.skipped.items() if "a strength of its own" in reason}
    assert left
    assert all(path not in left for path in result.changed)
    with torch.no_grad():
        call = context.calibration[0]
        for got, wanted in zip(flat(result.model(**call)), flat(loaded.module(**call)), strict=True):
            torch.testing.assert_close(got, wanted)  # at strength 0, which the caller left out
    baked = catalog.pass_class("perturb_heads")(u=0.5).plan(share(loaded.module), context)
    assert left <= baked.choice.keys(), "one strength for all rows needs no rows"


def test_heads_whose_keys_are_a_state_stay() -> None:
    loaded = sources.load("vevo-decoder:tiny")
    step = catalog.pass_class("select_heads")(mode="prune", score="fidelity", candidates=2)
    with pytest.raises(ToolchainError, match="there are 0 to choose from"):
        step.plan(share(loaded.module), context_of(loaded))


@pytest.mark.parametrize("model", ["tnt", "dydit"])
@pytest.mark.parametrize("name", ["factorize", "quantize_svd"])
def test_a_layer_in_the_place_of_another_need_not_know_its_width(name: str, model: str) -> None:
    loaded = sources.load(f"{model}:tiny")
    context = context_of(loaded)
    result = catalog.pass_class(name)(smallest=0).apply(share(loaded.module), context)
    assert result.changed
    with torch.no_grad():
        assert all(each.isfinite().all() for each in flat(result.model(**context.calibration[0])))


def test_products_of_a_program_are_counted_where_shapes_depend_on_values() -> None:
    loaded = sources.load("styleswin:tiny")
    context = context_of(loaded)
    routed = catalog.pass_class("dense_to_moe")(form="nonzero").apply(share(loaded.module), context)
    assert routed.changed
    assert context.example is not None
    assert 0 < macs(routed.model, context.example) < macs(loaded.module, context.example)


def test_guidance_and_perturbed_heads_reach_the_networks_of_a_generator() -> None:
    """Styles of both rows go from the mapping to the synthesis; heads are those of the synthesis alone."""
    loaded = sources.load("styleswin:tiny")
    context = context_of(loaded)
    guided = catalog.pass_class("merge_guidance")(condition="z", none=0.0, scale=2.0).apply(
        share(loaded.module), context
    )
    perturbed = catalog.pass_class("perturb_heads")(u=0.5, guidance=True, w=2.0).apply(share(loaded.module), context)
    worse = catalog.pass_class("perturb_heads")(u=0.5).apply(share(loaded.module), context)
    for rows in (1, 3):
        z = torch.randn(rows, 32)
        with torch.no_grad():
            plain, none, spoiled = loaded.module(z=z), loaded.module(z=torch.zeros(rows, 32)), worse.model(z=z)
            torch.testing.assert_close(guided.model(z=z), none + 2 * (plain - none), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(perturbed.model(z=z), plain + 2 * (plain - spoiled), atol=1e-5, rtol=1e-4)


def test_a_guided_decoder_keeps_two_caches_for_each_row() -> None:
    loaded = sources.load("vevo-decoder:tiny")
    context = context_of(loaded)
    guided = catalog.pass_class("merge_guidance")(condition="ids", none=3, scale=2.0).apply(
        share(loaded.module), context
    )
    perturbed = catalog.pass_class("perturb_heads")(u=0.5, guidance=True, w=2.0).apply(share(loaded.module), context)
    worse = catalog.pass_class("perturb_heads")(u=0.5).apply(share(loaded.module), context)
    assert {(s.shape, s.grows) for s in program_of(guided.model).states} == {((2, 2, 4, 64, 16), 4)}
    for rows in (1, 3):
        ids = torch.randint(48, (rows, 7))
        calls = [(ids[:, :4], 0), (ids[:, 4:5], 4), (ids[:, 5:6], 5)]
        runs = [share(loaded.module), share(loaded.module), share(worse.model), guided.model, perturbed.model]
        for given, place in calls:
            none = torch.full_like(given, 3)
            tokens = [given, none, given, given, given]
            with torch.no_grad():
                said = [net(ids=each, position=torch.tensor(place)) for net, each in zip(runs, tokens, strict=True)]
            plain, without, spoiled, got_guided, got_perturbed = said
            torch.testing.assert_close(got_guided, without + 2 * (plain - without), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(got_perturbed, plain + 2 * (plain - spoiled), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", ["styleswin", "li_dit", "vevo-decoder"])
def test_adapters_of_a_call_reach_every_network_that_they_are_for(model: str) -> None:
    loaded = sources.load(f"{model}:tiny")
    context = context_of(loaded)
    step = catalog.pass_class("adapters_as_inputs")(layers=("*",), rank=2)
    result = step.apply(share(loaded.module), context)
    torch.manual_seed(0)
    given = {each.name: torch.randn(each.shape) / 4 for each in step.new_inputs(result.plan)}
    intended = step.intended(loaded.module, result.plan, context)
    with torch.no_grad():
        call = context.calibration[0]
        base, adapted, wanted = (
            flat(module(**call, **more))
            for module, more in ((loaded.module, {}), (result.model, given), (intended, given))
        )
    for own, got, exact in zip(base, adapted, wanted, strict=True):
        assert (got - own).abs().max() > 0.1
        torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)


def test_blocks_are_coupled_in_a_network_whose_constants_were_hoisted() -> None:
    loaded = sources.load("dit:tiny")
    context = context_of(loaded)
    couple, call = catalog.pass_class("couple_streams")(gate=True), context.calibration[0]
    hoisted = catalog.pass_class("hoist_constants")().apply(share(loaded.module), context).model
    outputs = []
    for module in (share(loaded.module), hoisted):
        coupled = couple.apply(module, context).model
        with torch.no_grad():
            outputs.append([coupled(**call, couple_gate=torch.full((2,), open_)) for open_ in (0.0, 1.0)])
    for plain, other in zip(*outputs, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-5)
    shut, open_ = outputs[0]
    assert (open_ - shut).abs().max() > 1e-3
