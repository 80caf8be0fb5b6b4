import copy
import math
import weakref

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.recovery.distill import Distill
from enginewright.passes.tokens.dropping import (
    KeptCount,
    KeptShare,
    PolicyStep,
    keep_maps,
    probabilities,
    received,
    whole,
)
from enginewright.passes.tokens.fitting import fitted, watch
from enginewright.passes.tokens.interpreter import Fit, Interpreter, interpreter
from enginewright.passes.tokens.prune_tokens import PruneTokens
from enginewright.passes.tokens.running import token_stacks
from enginewright.passes.traits import PatchNetwork
from tests.passes.conftest import SUBJECTS, bert, vit
from tests.passes.tokens.engines import agrees, builds, exported, tripled


def evit_by_hand(subject, keep, *, fuse):
    """ViT with EViT's blocks, written out as the authors have them (their order of tokens too)."""
    model = subject.model
    with torch.no_grad():
        x = model.embeddings(subject.inputs["pixel_values"])
        for layer in model.layers:
            y, part = layer.layernorm_before(x), layer.attention
            q, k, v = (f(y).unflatten(-1, (4, 8)).transpose(1, 2) for f in (part.q_proj, part.k_proj, part.v_proj))
            attention = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
            x = x + part.o_proj((attention @ v).transpose(1, 2).flatten(2))
            score = attention[:, :, 0, 1:].mean(1)
            order = score.argsort(dim=-1, descending=True)
            left = math.ceil(keep * (x.shape[1] - 1))
            pick = lambda i, x=x: x[:, 1:].gather(1, i[..., None].expand(-1, -1, 32))  # noqa: E731
            parts = [x[:, :1], pick(order[:, :left])]
            if fuse:
                rest = order[:, left:]
                parts.append((pick(rest) * score.gather(1, rest)[..., None]).sum(1, keepdim=True))
            x = torch.cat(parts, dim=1)
            x = x + layer.mlp(layer.layernorm_after(x))
        return model.layernorm(x)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_pruned_vit_is_evit_block_by_block(fuse):
    subject = vit("sdpa")

    model = PruneTokens(keep=0.6, fuse=fuse, restore=False).apply(subject.copy(), Context()).model

    found, wanted = subject.output(model), evit_by_hand(subject, 0.6, fuse=fuse)
    assert found.shape == wanted.shape == (2, 9 if fuse else 7, 32)
    torch.testing.assert_close(found[:, 0], wanted[:, 0], atol=1e-5, rtol=0)
    order = [wanted[i, :, 0].argsort() for i in range(2)]  # the authors keep tokens in the order of their scores
    for i in range(2):
        torch.testing.assert_close(found[i][found[i, :, 0].argsort()], wanted[i][order[i]], atol=1e-5, rtol=0)


def test_the_plan_shows_which_tokens_of_calibration_inputs_stay(subject):
    plan = PruneTokens(keep=0.6).plan(subject.model, Context(calibration=[subject.inputs]))
    maps = keep_maps(PruneTokens(keep=0.6).rewrite(subject.copy(), plan), subject.inputs)
    leading = 0 if "dit" in type(subject.model).__name__.lower() else 1
    assert len(plan.facts.maps) == 2, "one for each of the batch"
    for shown, passed in zip(plan.facts.maps, maps[:, :, leading:].sum(1), strict=True):
        assert [left for row in shown.left for left in row] == passed.tolist()
        side = math.isqrt(len(passed))
        assert len(shown.left) == (side if side * side == len(passed) else 1)
        assert shown.borders == 2
    pictures = [x for x in subject.inputs.values() if x.ndim == 4 and x.shape[1] in (1, 3)]
    for number, shown in enumerate(plan.facts.maps):
        if not pictures:
            assert shown.picture == ()
            continue
        values = torch.tensor(shown.picture)
        assert (values.min(), values.max()) == (0, 255)
        by_hand = pictures[0][number]
        darkest = by_hand.unflatten(1, (len(values), -1)).unflatten(3, (len(values), -1)).mean((2, 4)).argmin()
        assert values.permute(2, 0, 1).flatten()[darkest] == 0


@pytest.mark.parametrize("method", ["attention", "policy"])
def test_keeping_all_changes_nothing_and_says_so(subject, method):
    context = Context(example=subject.inputs, calibration=[subject.inputs])
    result = PruneTokens(method=method, keep=1).apply(subject.copy(), context)
    assert result.changed == ()
    assert result.before == result.after
    assert len(result.plan.skipped) == 2
    assert torch.equal(subject.output(result.model), subject.output(subject.model))


@pytest.mark.parametrize("method", ["attention", "policy"])
def test_dropped_tokens_are_gone_for_good_and_come_back_as_they_were(subject, method):
    context = Context(calibration=[subject.inputs])
    model = PruneTokens(method=method, keep=0.6).apply(subject.copy(), context).model

    maps = keep_maps(model, subject.inputs)

    leading = 0 if "dit" in type(subject.model).__name__.lower() else 1
    tokens = maps.shape[-1] - leading
    rounded = math.ceil if method == "attention" else math.floor
    first = rounded(0.6 * tokens)
    assert maps.sum(-1).tolist() == [[leading + first, leading + rounded(0.6 * first)]] * 2
    assert not (maps[:, 1] & ~maps[:, 0]).any(), "a token came back"
    assert maps[..., :leading].all()
    assert subject.output(model).shape == subject.output(subject.model).shape


def test_what_is_dropped_before_the_first_block_leaves_as_it_came(dit):
    """With the policy's border before block 0, a dropped token comes out as it went in."""
    model = (
        PruneTokens(method="policy", keep=0.5, borders=(0,)).apply(dit.copy(), Context(calibration=[dit.inputs])).model
    )
    (run,) = model.blocks
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    with torch.no_grad():
        found = run(x, c)
    assert ((found == x).all(dim=-1).sum(dim=1) == 8).all()


def masked_reference(model, inputs, maps):
    """All tokens computed, and those that a map leaves out hidden from every query, from that block on."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        x = model.embeddings(inputs["pixel_values"])
        for layer, seen in zip(model.layers, maps.unbind(1), strict=True):
            bias = (
                torch.zeros(seen.shape)
                .masked_fill(~seen, float("-inf"))[:, None, None]
                .expand(-1, 1, seen.shape[1], -1)
            )
            x = layer(x, bias)
        return model.layernorm(x)


def test_the_short_model_is_the_whole_one_with_the_dropped_tokens_hidden():
    """The policy form drops before a block, so hiding the keys is exactly the same for what stays."""
    subject = vit("sdpa")
    context = Context(calibration=[subject.inputs])
    model = PruneTokens(method="policy", counts=(11, 6), borders=(0, 1)).apply(subject.copy(), context).model
    maps = keep_maps(model, subject.inputs)
    wanted = masked_reference(subject.model, subject.inputs, maps)
    found = subject.output(model)
    assert maps[:, 1].sum(-1).tolist() == [7, 7]
    torch.testing.assert_close(found[maps[:, 1]], wanted[maps[:, 1]], atol=1e-5, rtol=0)
    assert (found[~maps[:, 1]] - wanted[~maps[:, 1]]).abs().max() > 1e-2


# Text


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_padding_goes_first_and_changes_nothing(kind):
    subject = bert(kind)
    subject.inputs["attention_mask"][:] = 1
    subject.inputs["attention_mask"][:, 5:] = 0
    for method in ("attention", "policy"):
        step = PruneTokens(method=method, borders=(0,), counts=(4,))
        model = step.apply(subject.copy(), Context(calibration=[subject.inputs])).model
        assert keep_maps(model, subject.inputs)[:, 0].tolist() == [[True] * 5 + [False] * 2] * 2
        with torch.no_grad():
            wanted, found = subject.model(**subject.inputs), model(**subject.inputs)
        torch.testing.assert_close(found.last_hidden_state[:, :5], wanted.last_hidden_state[:, :5], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.pooler_output, wanted.pooler_output, atol=1e-5, rtol=0)


def test_text_is_scored_by_what_real_tokens_attend_to():
    mask = torch.tensor([0.0, 0.0, -1e9])[None, None, None]
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    attention = probabilities(q, k, mask)
    torch.testing.assert_close(received(attention, mask), attention[:, :, :2].mean(dim=2))
    torch.testing.assert_close(received(attention, None), attention.mean(dim=2))


def test_a_real_token_is_dropped_where_there_are_too_many():
    subject = bert("sdpa")
    model = PruneTokens(keep=0.5).apply(subject.copy(), Context()).model
    moved = (subject.output(model) - subject.output(subject.model)).abs()
    assert moved.max() > 1e-2


# The interpreter


def test_the_fitted_start_finds_what_attention_depends_on():
    torch.manual_seed(0)
    x, true = torch.randn(500, 6), torch.randn(2, 6)
    fit = Fit()
    for rows in (slice(0, 7), slice(7, 500)):  # call by call
        fit.add(x[rows], (x @ true.T + 0.3).exp()[rows])
    weight, bias = fit.solved()
    torch.testing.assert_close(weight, true, atol=0.02, rtol=0)
    torch.testing.assert_close(bias, torch.full((2,), 0.3), atol=0.02, rtol=0)
    scores = interpreter(weight, bias, x)(x[None])
    torch.testing.assert_close(scores[0], torch.sigmoid(x @ true.T + 0.3).mean(-1), atol=0.02, rtol=0)


def test_a_fit_is_the_least_squares_of_all_calls_and_keeps_no_token():
    torch.manual_seed(0)
    subject = vit("sdpa")
    calls = [{"pixel_values": torch.randn(2, 3, 8, 8)} for _ in range(3)]
    (found,), _ = token_stacks(subject.model, Context(calibration=calls, example=calls[0]))
    seen, alive = [], []

    def see(x, attention, real):
        alive.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(x))
        assert attention.shape == (*x.shape[:2], 4)
        assert real.all()

    watch(subject.model, found, (0, 1), Context(calibration=calls), [see, see])
    assert len(seen) == 6
    assert max(alive) <= 1  # of what came before, no more than the tokens of one block
    together = {name: torch.cat([call[name] for call in calls]) for name in calls[0]}
    apart = fitted(subject.model, found, (0, 1), Context(calibration=calls))
    at_once = fitted(subject.model, found, (0, 1), Context(calibration=[together]))
    for name, array in apart.items():
        torch.testing.assert_close(array, at_once[name], rtol=1e-3, atol=1e-4)


def test_counts_come_from_calibration_and_fall():
    subject = vit("sdpa")
    context = Context(calibration=[subject.inputs, {"pixel_values": torch.randn(3, 3, 8, 8)}])
    found = []
    for quantile in (0.2, 1.0):
        plan = PruneTokens(method="policy", quantile=quantile).plan(subject.model, context)
        found.append([plan.choice[f"layers.{i}"].count for i in range(2)])
    assert all(second <= first for first, second in found)
    assert all(low <= high for low, high in zip(*found, strict=True))
    assert all(1 <= count <= 16 for counts in found for count in counts)


def test_a_plan_carries_the_interpreters_and_is_replayed_without_data(tmp_path):
    subject = vit("sdpa")
    step = PruneTokens(method="policy", keep=0.5)
    plan = step.plan(subject.model, Context(calibration=[subject.inputs]))
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json", step.declared)
    models = [step.rewrite(subject.copy(), each) for each in (plan, again)]
    assert torch.equal(*(subject.output(model) for model in models))
    names = {f"layers.{i}.interpreter.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert set(plan.arrays) == names
    assert sum(a.numel() for a in plan.arrays.values()) == 2 * 4 * 33


def test_while_training_the_gate_is_1_and_teaches_the_interpreter():
    subject = vit("sdpa")
    model = PruneTokens(method="policy", keep=0.5).apply(subject.copy(), Context(calibration=[subject.inputs])).model
    before = subject.output(model)
    model.train()
    output = model(**subject.inputs)[0]
    torch.testing.assert_close(output, before, atol=0, rtol=0)
    output.square().sum().backward()
    steps = [m for m in model.modules() if isinstance(m, PolicyStep)]
    assert all(step.interpreter.products.weight.grad.abs().max() > 0 for step in steps)


def test_distilling_teaches_the_interpreters():
    subject = vit("sdpa")
    context = Context(calibration=[subject.inputs], original=subject.model)
    model = PruneTokens(method="policy", keep=0.5).apply(subject.copy(), context).model
    train = Distill(steps=2, batch=1, lr=1e-3, train=("*.interpreter.products",))
    plan = train.plan(model, context)
    assert {path.rpartition(".")[2] for path in plan.choice} == {"products"}
    assert plan.choice, "their gradient is not zero"


def test_new_modules_are_in_the_mode_of_the_model(dit):
    for training in (True, False):
        result = PruneTokens(method="policy", keep=0.5).apply(
            dit.copy().train(training), Context(calibration=[dit.inputs])
        )
        assert {module.training for module in result.model.modules()} == {training}


def test_an_interpreter_is_small_and_its_scores_are_shares():
    layer = Interpreter(384, 6)
    assert sum(p.numel() for p in layer.parameters()) == 6 * 385
    scores = layer(torch.randn(2, 5, 384))
    assert scores.shape == (2, 5)
    assert ((scores > 0) & (scores < 1)).all()


# Numbers


@pytest.mark.parametrize(
    ("entry", "tokens", "up", "left"),
    [
        (KeptShare(keep=0.7), 196, True, 138),
        (KeptShare(keep=0.83), 196, False, 162),
        (KeptShare(keep=0.83), 162, False, 134),
        (KeptShare(keep=0.1), 3, False, 1),
        (KeptShare(keep=0.5), 16, True, 8),
        (KeptCount(count=9), 5, True, 5),
    ],
)
def test_shares_are_whole_tokens(entry, tokens, up, left):
    assert whole(entry, tokens, up=up) == left


def test_keeping_fewer_costs_less(dit):
    macs = [
        PruneTokens(keep=keep).apply(dit.copy(), Context(example=dit.inputs)).after.macs for keep in (0.9, 0.7, 0.4)
    ]
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == 3


def test_default_borders_stand_at_quarters_and_thirds():
    class Blocks(nn.Module, PatchNetwork):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(copy.deepcopy(SUBJECTS["reference_dit"]().model.blocks[0]) for _ in range(12))

        def forward(self, x, c):
            for block in self.blocks:
                x = block(x, c)
            return x

    calls = [{"x": torch.randn(2, 8, 32), "c": torch.randn(2, 32)}]
    model = Blocks()
    assert list(PruneTokens().plan(model, Context()).choice) == ["blocks.3", "blocks.6", "blocks.9"]
    policy = PruneTokens(method="policy").plan(model, Context(calibration=calls))
    assert list(policy.choice) == ["blocks.0", "blocks.4", "blocks.8"]
    assert policy.skipped["blocks.1"] == "no border: it runs on the tokens that it gets"


# What a user can mend


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "policy"}, "needs calibration inputs and got none"),
        ({"borders": (0, 2)}, r"borders are \(0, 2\); they must rise, from 0 to at most 1"),
        ({"borders": (1, 0)}, "they must rise"),
        ({"counts": (3,)}, "need as many borders; borders is None"),
        ({"counts": (3,), "borders": (0, 1)}, "need as many borders"),
        ({"quantile": 0.5}, "quantile is for method 'policy' without counts"),
        ({"restore": False}, "reads every token at its end"),
        ({"score": "class"}, "this model has no class token"),
    ],
)
def test_parameters_that_do_not_fit_are_named(dit, parameters, message):
    with pytest.raises(ToolchainError, match=message):
        PruneTokens(**parameters).plan(dit.model, Context())


def test_fusing_needs_attention(dit):
    with pytest.raises(ToolchainError, match="fuse weighs by attention"):
        PruneTokens(method="policy", fuse=True).plan(dit.model, Context(calibration=[dit.inputs]))
    with pytest.raises(ToolchainError, match=r"keep is 0\b"):
        PruneTokens(keep=0)


# Engines


@pytest.mark.parametrize("method", ["attention", "policy"])
def test_engines_agree_at_every_batch(method, tmp_path):
    subject = vit("sdpa")
    step = PruneTokens(method=method, keep=0.6, fuse=method == "attention")
    model = step.apply(subject.copy(), Context(calibration=[subject.inputs])).model
    path = exported(model, subject.inputs, tmp_path)
    agrees(model, [subject.inputs, tripled(subject.inputs)], path)
    builds(path, subject.inputs, tmp_path)


def test_text_of_any_length_keeps_its_share(tmp_path):
    subject = bert("sdpa")
    model = PruneTokens(keep=0.6).apply(subject.copy(), Context()).model
    path = exported(model, subject.inputs, tmp_path, length="text")
    longer = {name: torch.cat([tensor, tensor], dim=1) for name, tensor in subject.inputs.items()}
    agrees(model, [subject.inputs, tripled(subject.inputs), longer], path)
