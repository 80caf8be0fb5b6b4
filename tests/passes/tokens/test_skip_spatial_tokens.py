import pytest
import torch

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.dynamic.slice_width_by_timestep import SliceWidthByTimestep
from enginewright.passes.tokens.running import TokenRun
from enginewright.passes.tokens.skip_spatial_tokens import RunTokens, SkipSpatialTokens
from enginewright.passes.tokens.skipping import SkipStep, put_back
from enginewright.passes.traits import TokenStack, layers_of
from tests.passes.conftest import SUBJECTS
from tests.passes.joint import JOINT
from tests.passes.tokens.engines import agrees, builds, exported, tripled

PICTURES = ("reference_dit", "diffusers_dit_sdpa", "vit_sdpa")


def skipping(subject, **parameters):
    step = SkipSpatialTokens(**parameters)
    return step, step.apply(subject.copy(), Context(calibration=[subject.inputs], example=subject.inputs))


class Masked(SkipStep):
    """The form that saves nothing: every token runs, and what those below the k-th score get is dropped."""

    def feed(self, tokens, call):
        x = tokens.x
        scores = (x @ self.router.products.weight.T + self.router.products.bias)[..., 0]
        content = scores[:, self.leading :]
        kth = content.sort(dim=1, descending=True).values[:, self.count - 1 : self.count]
        runs = torch.cat([torch.ones_like(scores[:, : self.leading], dtype=torch.bool), content >= kth], dim=1)
        y = call.add_feed_forward(x, call.feed_forward(call.feed_forward_input(x)))
        tokens.x = torch.where(runs[..., None], y, x)


def masked(model):
    for step in [module for module in model.modules() if isinstance(module, SkipStep)]:
        step.__class__ = Masked
    return model


@pytest.mark.parametrize("ratio", [0.3, 0.75])
@pytest.mark.parametrize("name", PICTURES)
def test_gathered_tokens_give_what_the_mask_gives(name, ratio):
    subject = SUBJECTS[name]()
    step, result = skipping(subject, ratio=ratio)
    reference = masked(step.rewrite(subject.copy(), result.plan))
    found = subject.output(result.model)
    torch.testing.assert_close(found, subject.output(reference), atol=1e-5, rtol=0)
    assert (found - subject.output(subject.model)).abs().max() > 1e-2
    assert len(result.changed) == 2


@pytest.mark.parametrize("name", PICTURES)
def test_every_token_is_as_before_where_all_of_them_run(name):
    """The twin: routers in place, and nothing passed by."""
    subject = SUBJECTS[name]()
    step, result = skipping(subject)
    choice = {path: RunTokens(tokens=entry.of, of=entry.of) for path, entry in result.plan.choice.items()}
    model = step.rewrite(subject.copy(), type(result.plan)(choice=choice, arrays=result.plan.arrays))
    torch.testing.assert_close(subject.output(model), subject.output(subject.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PICTURES)
def test_a_ratio_of_0_changes_nothing_and_says_so(name):
    subject = SUBJECTS[name]()
    _, result = skipping(subject, ratio=0)
    assert result.changed == ()
    assert {reason.partition(" of its")[0] for reason in result.plan.skipped.values()} == {"a ratio of 0.0"}
    assert torch.equal(subject.output(result.model), subject.output(subject.model))
    assert result.before.macs == result.after.macs


def test_feed_forwards_cost_what_their_tokens_do(dit):
    _, result = skipping(dit, ratio=0.75)
    assert result.plan.choice == {f"blocks.{i}": RunTokens(tokens=4, of=16) for i in range(2)}
    saved = 2 * 2 * (12 * 2 * 4 * 32 * 32 - 16 * 32)  # layers, rows: tokens that pass by, less the router
    assert result.before.macs - result.after.macs == saved


def test_tokens_that_the_feed_forward_hardly_moves_pass_by(dit):
    """A direction of the stream tells which tokens move: the router finds it."""
    mlp = dit.model.blocks[0].mlp
    with torch.no_grad():
        mlp.fc1.weight.copy_(torch.outer(torch.ones(128), torch.eye(32)[3]) * 3)
        mlp.fc1.bias.fill_(-2.0)
    calls = [{**dit.inputs, "x": torch.randn(2, 4, 8, 8)} for _ in range(24)]
    step = SkipSpatialTokens(exclude=("blocks.1",))
    result = step.apply(dit.copy(), Context(calibration=calls, example=dit.inputs))
    facts = result.plan.facts.model_extra["blocks.0"]
    assert facts["moves_kept"] > 0.9 * facts["moves_kept_at_best"] > 0.6
    weight = result.plan.arrays["blocks.0.router.weight"][0]
    assert weight.abs().argmax() == 3
    assert result.plan.skipped == {"blocks.1": "excluded by 'blocks.1'"}


def test_as_many_score_above_a_half_as_run(dit):
    _, result = skipping(dit, ratio=0.25, exclude=("blocks.1",))
    (run,) = (module for module in result.model.modules() if isinstance(module, TokenRun))
    scores = []
    run.steps[0].router.products.register_forward_hook(lambda *args: scores.append(args[2].sigmoid()))
    dit.output(result.model)
    assert (scores[0] > 0.5).sum() == 24  # of 32 in two samples
    shares = result.plan.facts.model_extra["blocks.0"]["samples_with_more_above_half"]
    assert shares == ((scores[0] > 0.5).sum(dim=1) > 12).float().mean()


def test_it_follows_networks_by_timestep(dit):
    """DyDiT has both: narrower networks by timestep, and tokens that pass by in each of them."""
    dit.inputs["t"] = torch.tensor([0.0, 999.0])  # a row for each network
    context = Context(calibration=[dit.inputs], example=dit.inputs)
    narrow = SliceWidthByTimestep(steps=6, buckets=2, importance="activation")
    sliced, again = (narrow.apply(dit.copy(), context) for _ in range(2))
    before = dit.output(sliced.model)
    step = SkipSpatialTokens()
    result = step.apply(sliced.model, context)
    assert result.changed == tuple(f"networks.{v}.blocks.{b}" for v in range(2) for b in range(2))
    assert result.after.macs < 0.9 * sliced.after.macs
    found = dit.output(result.model)
    reference = masked(step.rewrite(again.model, result.plan))
    torch.testing.assert_close(found, dit.output(reference), atol=1e-5, rtol=0)
    assert (found - before).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_a_network_that_no_calibration_input_reaches_is_left_alone(dit):
    dit.inputs["t"] = torch.zeros(2)
    context = Context(calibration=[dit.inputs], example=dit.inputs)
    sliced = SliceWidthByTimestep(steps=6, buckets=2, importance="activation").apply(dit.copy(), context)
    result = SkipSpatialTokens().apply(sliced.model, context)
    assert result.changed == ("networks.1.blocks.0", "networks.1.blocks.1")
    reason = "the calibration inputs never reach it"
    assert result.plan.skipped == {"networks.0.blocks.0": reason, "networks.0.blocks.1": reason}


def test_rows_are_put_back_where_they_were():
    x = torch.arange(10.0).view(2, 5, 1)
    found = put_back(x, -torch.ones(2, 2, 1), torch.tensor([[0, 3], [1, 4]]))
    assert found[..., 0].tolist() == [[-1, 1, 2, -1, 4], [5, -1, 7, 8, -1]]


def test_leading_tokens_always_run():
    subject = SUBJECTS["vit_sdpa"]()
    _, result = skipping(subject, ratio=0.9)
    assert result.plan.choice["layers.0"] == RunTokens(tokens=2, of=16)
    seen = []
    (run,) = (module for module in result.model.modules() if isinstance(module, TokenRun))
    run.steps[0].block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    subject.output(result.model)
    assert seen == [3]


def test_routers_have_a_gradient_while_they_train(dit):
    _, result = skipping(dit)
    (run,) = (module for module in result.model.modules() if isinstance(module, TokenRun))
    before = dit.output(result.model)
    result.model.train()
    with torch.no_grad():
        torch.testing.assert_close(result.model(**dit.inputs), before)
    result.model(**dit.inputs).square().sum().backward()
    assert all(step.router.products.weight.grad.abs().max() > 0 for step in run.steps)


@pytest.mark.parametrize("name", PICTURES)
def test_it_exports_runs_at_other_batches_and_builds(name, tmp_path):
    subject = SUBJECTS[name]()
    _, result = skipping(subject)
    path = exported(result.model, subject.inputs, tmp_path)
    agrees(result.model, [subject.inputs, tripled(subject.inputs)], path)
    builds(path, subject.inputs, tmp_path)


# What is left alone, and what a user can mend


def test_text_and_unknown_models_are_left_alone():
    subject = SUBJECTS["bert_sdpa"]()
    _, result = skipping(subject)
    assert result.changed == ()
    assert set(result.plan.skipped.values()) == {"its tokens are not those of a picture"}
    plan = SkipSpatialTokens().plan(torch.nn.Linear(2, 2), Context(calibration=[{"input": torch.zeros(1, 2)}]))
    assert plan.skipped == {"": "no family knows how the blocks of a Linear run on fewer tokens"}


def test_an_exclude_that_matches_nothing_is_refused(dit):
    with pytest.raises(ToolchainError, match=r"exclude 'blocks\.7' matches no block"):
        skipping(dit, exclude=("blocks.7",))


def test_values_that_are_not_finite_are_refused(dit):
    dit.model.blocks[1].mlp.fc2.weight.data.fill_(float("inf"))
    with pytest.raises(ToolchainError, match="what its feed-forward does to the calibration inputs is not finite"):
        skipping(dit)


def test_a_plan_for_another_model_is_refused(dit):
    step, result = skipping(dit)
    with pytest.raises(ToolchainError, match=r"the plan is for another model: 'blocks\.0' is no block of this one"):
        step.rewrite(result.model, result.plan)


def test_without_calibration_it_says_so(dit):
    with pytest.raises(ToolchainError, match="needs calibration inputs and got none"):
        SkipSpatialTokens().apply(dit.copy(), Context(example=dit.inputs))


def test_a_run_is_no_stack_any_more(dit):
    _, result = skipping(dit)
    assert not list(layers_of(result.model, TokenStack))


def test_a_smaller_picture_runs_as_large_a_share_of_its_tokens():
    subject = JOINT["sd3"]()
    _, result = skipping(subject, ratio=0.75)
    small = {**subject.inputs, "hidden_states": subject.inputs["hidden_states"][..., :2, :4]}
    steps = [module for module in result.model.modules() if isinstance(module, SkipStep)]
    assert {(step.count, step.of) for step in steps} == {(4, 16)}
    with torch.no_grad():
        assert result.model(**small)[0].isfinite().all(), "2 tokens, of which 1 runs"
