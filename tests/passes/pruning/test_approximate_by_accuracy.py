from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.kernel.surgery import share
from enginewright.passes.pruning.approximate_by_accuracy import ApproximateByAccuracy
from enginewright.passes.pruning.elements import CutLayer, carry_out, elements_of
from enginewright.passes.pruning.hard_attention import HardAttention
from enginewright.passes.traits import FeedForward, HeadedAttention, layer_at
from tests.engines import built, exported, in_onnxruntime
from tests.passes.conftest import SUBJECTS


def scored(function):
    return Context(score_of=lambda text: function)


def missing(model):
    """Paths of the layers that were taken out whole, by what stands in their place."""
    return [path for path, module in model.named_modules() if type(module).__name__ in ("Zeros", "Silent")]


def distance(subject, target):
    """A score: closeness of the first output to that of a target."""
    wanted = subject.output(target)
    return lambda model: -float((subject.output(model) - wanted).norm() / wanted.norm())


def mask(model, choice):
    """The same choice with zeros: columns of output projections, and their biases where all of a layer goes."""
    for path, entry in choice.items():
        layer = layer_at(model, path, FeedForward if entry.kind == "ffn" else HeadedAttention)
        each = 1 if entry.kind == "ffn" else layer.head_dim
        gone = range(entry.of) if entry.whole else entry.removed
        with torch.no_grad():
            layer.output.weight[:, [part * each + i for part in gone for i in range(each)]] = 0
            if entry.whole:
                layer.output.bias.zero_()
    return model


# Exactness


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_removed_is_masked(subject, seed):
    draw = random.Random(seed)
    choice = {}
    for element in elements_of(subject.model):
        whole = draw.random() < 0.4
        removed = () if whole else sorted(draw.sample(range(element.of), draw.randrange(1, element.of)))
        choice[element.path] = CutLayer(kind=element.kind, of=element.of, whole=whole, removed=tuple(removed))

    cut = carry_out(share(subject.model), choice)

    wanted = subject.output(mask(subject.copy(), choice))
    torch.testing.assert_close(subject.output(cut), wanted, atol=1e-5, rtol=0)
    assert (wanted - subject.output(subject.model)).abs().max() > 1e-2


def test_parameters_fall_by_the_integers_of_bert_base():
    """The card: a head is 196,800 parameters, 256 hidden units 393,472, an attention 2,362,368, an FFN 4,722,432."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=1))
    ffn, attention = elements_of(model)

    def lost(element, **change):
        what = CutLayer(kind=element.kind, of=element.of, **change)
        cut = carry_out(share(model), {element.path: what})
        return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in cut.parameters())

    assert lost(attention, removed=[3]) == 196_800
    assert lost(ffn, removed=list(range(256))) == 393_472
    assert lost(attention, whole=True) == 2_362_368
    assert lost(ffn, whole=True) == 4_722_432


# The search


def test_the_order_is_last_block_first_and_feed_forward_before_attention(subject):
    found = [(element.kind, element.path) for element in elements_of(subject.model)]
    assert [kind for kind, _ in found] == ["ffn", "attention"] * 2
    assert ".1" in found[0][1]
    assert ".1." in found[1][1]
    assert found[1][1] == subject.paths[1]
    assert found[3][1] == subject.paths[0]


def test_what_a_target_lacks_is_found_and_the_rest_stays(dit):
    """The score wants the model without one feed-forward and without two heads."""
    target = mask(
        dit.copy(),
        {
            "blocks.1.mlp": CutLayer(kind="ffn", of=128, whole=True),
            "blocks.0.attn": CutLayer(kind="attention", of=4, removed=(1, 2)),
        },
    )
    step = ApproximateByAccuracy(score="mine", gate=10, group=64)

    result = step.apply(dit.copy(), scored(distance(dit, target)))

    assert missing(result.model) == ["blocks.1.mlp"]
    assert result.plan.choice["blocks.0.attn"].removed == (1, 2)
    torch.testing.assert_close(dit.output(result.model), dit.output(target), atol=1e-5, rtol=0)
    assert set(result.plan.skipped) == {"blocks.1.attn", "blocks.0.mlp"}
    trials = result.plan.facts.trials
    assert [t["path"] for t in trials if t["what"] == "whole"] == [e.path for e in elements_of(dit.model)]
    assert [t["what"] for t in trials if t["path"] == "blocks.0.mlp"] == ["whole", "0-63", "64-127"]
    kept = [trial["score"] for trial in trials if trial["verdict"] == "kept"]
    assert kept == sorted(kept)
    assert result.plan.facts.best == kept[-1]


def test_nothing_is_left_out_of_a_model_that_needs_everything(subject):
    step, context = ApproximateByAccuracy(score="mine", gate=0), scored(distance(subject, subject.model))
    before = copy.deepcopy(subject.model.state_dict())

    result = step.apply(subject.copy(), context)

    assert result.changed == ()
    assert list(result.plan.skipped.values()) == ["the model does worse without any of it"] * 4
    assert [trial["verdict"] for trial in result.plan.facts.trials] == ["worse"] * 4
    torch.testing.assert_close(result.model.state_dict(), before, atol=0, rtol=0)


def test_a_tolerance_is_kept_to_the_best_and_not_to_the_last(dit):
    """Each trial costs 1; with 1.5 to lose, only the first is kept."""
    step = ApproximateByAccuracy(score="mine", tolerance=1.5, gate=0)
    plan = step.plan(dit.model, scored(lambda model: -float(len(missing(model)))))
    assert [trial["verdict"] for trial in plan.facts.trials] == ["kept", "worse", "worse", "worse"]
    assert plan.facts.best == 0


@pytest.mark.parametrize(("gate", "trials"), [(0.5, 4 + 2 * 2 + 2 * 4), (0.1, 4)])
def test_parts_are_tried_only_where_the_whole_fails_narrowly(dit, gate, trials):
    """Anything that goes costs 0.3, of a score of 0: less than half of 1, more than a tenth."""
    size = sum(parameter.numel() for parameter in dit.model.parameters())
    score = scored(lambda model: -0.3 * (sum(parameter.numel() for parameter in model.parameters()) < size))
    plan = ApproximateByAccuracy(gate=gate, group=64).plan(dit.model, score)
    assert len(plan.facts.trials) == trials
    assert plan.choice == {}


def test_losses_pass_both_tests(dit):
    """The mean falls, and yet too many samples get worse; then few do; then the mean does not fall."""
    answers = iter([[1.0, 1, 1, 1], [0.0, 1.1, 1.1, 1], [0.9, 0.9, 0.9, 1.1], [0.94, 0.94, 0.94, 0.98], [9.0] * 4])
    context = Context(losses_of=lambda text: lambda model: torch.tensor(next(answers)))

    plan = ApproximateByAccuracy(losses="f.py:f", gate=0).plan(dit.model, context)

    assert [(t["verdict"], t["loss"], t["no_worse"]) for t in plan.facts.trials] == [
        ("worse, narrowly", 0.8, 2),
        ("kept", 0.95, 3),
        ("worse", 0.95, 4),
        ("worse", 9.0, 0),
    ]
    assert list(plan.choice) == ["blocks.1.attn"]
    assert (plan.facts.start, plan.facts.best) == (1, 0.95)


def test_hard_attention_comes_first_and_falls_away_with_the_layer(dit):
    def score(model):
        hard = [path for path, module in model.named_modules() if isinstance(module, HardAttention)]
        return len(hard) + 5 * ("blocks.0.attn" in missing(model)) - len(missing(model))

    plan = ApproximateByAccuracy(hard_attention=3, gate=0).plan(dit.model, scored(score))

    assert [(t["path"], t["what"]) for t in plan.facts.trials[:2]] == [
        ("blocks.0.attn", "hard"),
        ("blocks.1.attn", "hard"),
    ]
    assert plan.choice["blocks.1.attn"] == CutLayer(kind="attention", of=4, hard=3)
    assert plan.choice["blocks.0.attn"].whole
    assert plan.choice["blocks.0.attn"].hard == 0


def test_heads_and_hard_attention_go_together(subject):
    path = subject.paths[0]
    entry = CutLayer(kind="attention", of=4, removed=(2,), hard=1000)
    cut = carry_out(share(subject.model), {path: entry})
    masked = mask(subject.copy(), {path: entry})
    torch.testing.assert_close(subject.output(cut), subject.output(masked), atol=1e-5, rtol=1e-5)


def test_a_layer_that_cannot_go_whole_is_tried_in_parts_and_keeps_the_last():
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    model = nn.ModuleDict({"block": FluxSingleTransformerBlock(8, 2, 4, mlp_ratio=4.0)})
    context = scored(lambda model: -float(sum(p.numel() for p in model.parameters())))
    plan = ApproximateByAccuracy(group=16).plan(model, context)
    trials = [t for t in plan.facts.trials if t["path"] == "block"]
    assert [(t["what"], t["verdict"]) for t in trials] == [
        ("whole", "cannot"),
        ("0-15", "kept"),
        ("whole", "cannot"),
        ("0-0", "kept"),
    ]
    assert "shares a projection" in trials[0]["refused"]
    assert plan.choice["block:ffn"].removed == tuple(range(16))
    assert plan.choice["block:attention"].removed == (0,)
    cut = ApproximateByAccuracy(group=16).rewrite(model, plan)["block"]
    assert (cut.proj_mlp.out_features, cut.proj_out.in_features) == (16, 4 + 16)


# What a plan says


def test_a_plan_is_repeatable_and_replayed_where_there_are_no_weights(dit):
    step = ApproximateByAccuracy(score="mine", tolerance=0.5, gate=1, group=64)
    context = scored(distance(dit, dit.model))
    plan = step.plan(dit.model, context)
    assert plan.choice
    assert step.plan(dit.model, context).digest() == plan.digest()
    empty = step.rewrite(dit.copy().to("meta"), Plan.from_json(plan.as_json(), by=step.declared))
    real = step.rewrite(dit.copy(), plan)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_progress_and_exclusion(dit):
    told = []
    context = Context(
        score_of=lambda text: lambda model: 0.0, say=lambda done, total, text: told.append((done, total, text))
    )
    plan = ApproximateByAccuracy(exclude=("*.mlp",)).plan(dit.model, context)
    assert told == [(0, 2, "without blocks.1.attn"), (1, 2, "without blocks.0.attn")]
    assert plan.skipped == {"blocks.0.mlp": "excluded by '*.mlp'", "blocks.1.mlp": "excluded by '*.mlp'"}
    assert ApproximateByAccuracy(exclude=("*",)).plan(dit.model, Context()).choice == {}


# What a user can mend


def test_what_a_user_can_mend_is_said(dit):
    with pytest.raises(ToolchainError, match="meta device"):
        ApproximateByAccuracy().plan(dit.copy().to("meta"), scored(lambda model: 0.0))
    with pytest.raises(ToolchainError, match="exclude 'x' matches no layer"):
        ApproximateByAccuracy(exclude=("x",)).plan(dit.model, Context())
    with pytest.raises(ToolchainError, match="no score 'fidelity' here"):
        ApproximateByAccuracy(score="fidelity").plan(dit.model, Context())
    with pytest.raises(ToolchainError, match=r"no losses 'a.py:f' here"):
        ApproximateByAccuracy(losses="a.py:f").plan(dit.model, Context())
    with pytest.raises(ToolchainError, match="value is not finite: nan"):
        ApproximateByAccuracy().plan(dit.model, scored(lambda model: float("nan")))
    entry = CutLayer(kind="ffn", of=64, removed=(1,))
    with pytest.raises(ToolchainError, match="for a layer of 64 parts; this one has 128"):
        ApproximateByAccuracy().rewrite(dit.copy(), Plan(choice={"blocks.0.mlp": entry}))


# What follows


@pytest.mark.parametrize("name", ["reference_dit", "bert_eager"])
def test_what_is_left_exports_runs_and_builds(name, tmp_path):
    subject = SUBJECTS[name]()
    last, first = subject.paths[1], subject.paths[0]
    choice = {
        each.path: CutLayer(
            kind=each.kind, of=each.of, whole=each.path == last or (each.kind == "ffn" and ".0" in each.path)
        )
        for each in elements_of(subject.model)
    }
    choice[first] = choice[first].model_copy(update={"removed": (1,), "hard": 3})
    model = carry_out(share(subject.model), choice)
    count = 1 if subject.inputs.keys() & {"x", "hidden_states"} else 2
    path = exported(model, subject.inputs, tmp_path, [f"y{i}" for i in range(count)])
    torch.testing.assert_close(in_onnxruntime(path, subject.inputs), subject.output(model), atol=1e-4, rtol=0)
    if "x" in subject.inputs:
        pytest.importorskip("tensorrt_rtx")
        assert (built(path, subject.inputs) / "engine.plan").stat().st_size > 1000
