from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.models.diffusion.dit import TINY, DiT
from enginewright.passes.contract import Context, Plan
from enginewright.passes.pruning.prune_depth import PruneDepth, RemovedBlocks
from enginewright.passes.traits import BlockStack, layers_of
from tests.engines import built, exported, in_onnxruntime


class Block(nn.Module):
    """x + attn(x) + mlp(x), where both only scale by a number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(2, 2, bias=False), nn.Identity()
        with torch.no_grad():
            self.attn.weight.copy_(torch.tensor([[0.0, -number], [number, 0.0]]))

    def forward(self, x):
        return x + self.attn(x)


class Stack(nn.Module):
    """A turn of the plane by each block: the larger its number, the more it turns."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(number) for number in numbers)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


CALLS = [{"x": torch.tensor([[[1.0, 2.0], [0.5, -1.0]]])}]


def stack_of(model):
    [(path, stack)] = layers_of(model, BlockStack)
    return path, stack


def passed_by(subject, plan):
    """A copy of the model whose removed blocks hand on what they get."""
    model = subject.copy()
    for path, entry in plan.choice.items():
        for i in entry.removed:
            block = model.get_submodule(f"{path}.{i}")
            block.forward = lambda *args, **kwargs: args[0] if args else kwargs["hidden_states"]
    return model


# Exactness


@pytest.mark.parametrize("method", ["influence", "greedy", "list"])
def test_a_removed_block_is_a_block_passed_by(subject, method):
    path, stack = stack_of(subject.model)
    last = f"{path}.{len(stack.blocks) - 1}"
    context = Context(calibration=[subject.inputs], score_of=lambda text: lambda model: 1.0)

    result = PruneDepth(count=1, method=method, blocks=(last,)).apply(subject.copy(), context)

    after = subject.output(result.model)
    assert result.changed == (path,)
    assert len(stack_of(result.model)[1].blocks) == 1
    torch.testing.assert_close(after, subject.output(passed_by(subject, result.plan)), atol=1e-5, rtol=0)
    assert (after - subject.output(subject.model)).abs().max() > 1e-2


def test_blocks_that_do_nothing_go_and_the_output_stays(dit):
    model = DiT(replace(TINY, depth=4)).eval()
    for i in (0, 2, 3):  # a block starts as the identity; one of the four does something
        nn.init.zeros_(model.blocks[i].adaLN_modulation[-1].weight)
    nn.init.normal_(model.blocks[1].adaLN_modulation[-1].weight)
    nn.init.normal_(model.final_layer.linear.weight)
    before = dit.output(model)

    result = PruneDepth(share=0.75).apply(model, Context(calibration=[dit.inputs]))

    assert result.plan.choice["blocks"] == RemovedBlocks(removed=(0, 2, 3), of=4)
    torch.testing.assert_close(dit.output(result.model), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["influence", "greedy", "list"])
def test_nothing_to_remove_changes_nothing_and_says_so(dit, method):
    before = copy.deepcopy(dit.model.state_dict())
    result = PruneDepth(share=0, method=method).apply(dit.copy(), Context(calibration=[dit.inputs]))
    assert result.changed == ()
    reason = "none of its blocks is named" if method == "list" else "a share of 0.0 of its 2 blocks comes to none"
    assert result.plan.skipped == {"blocks": reason}
    torch.testing.assert_close(result.model.state_dict(), before, atol=0, rtol=0)


# What is judged


def test_influence_by_hand():
    """A block turns by the arc tangent of its number, so that its influence is 1 - 1/sqrt(1 + number^2)."""
    numbers = (0.5, 0.1, 2.0, 0.3)
    plan = PruneDepth(count=2).plan(Stack(*numbers), Context(calibration=CALLS))
    wanted = {f"blocks.{i}": 1 - (1 + n * n) ** -0.5 for i, n in enumerate(numbers)}
    assert plan.facts.influence == pytest.approx(wanted, rel=1e-4)
    assert plan.choice == {"blocks": RemovedBlocks(removed=(1, 3), of=4)}


def test_greedy_removes_what_the_score_misses_least_and_logs_every_trial():
    """The score wants two of four blocks gone that influence would keep."""
    x = CALLS[0]["x"]
    target = Stack(0.2, 0.1)(x).detach()

    def closeness(candidate):
        return float(torch.cosine_similarity(candidate(x).detach(), target, dim=-1).mean())

    model, context = Stack(1.0, 0.2, 0.9, 0.1), Context(calibration=CALLS, score_of=lambda text: closeness)

    plan = PruneDepth(count=2, method="greedy").plan(model, context)

    assert plan.choice == {"blocks": RemovedBlocks(removed=(0, 2), of=4)}
    first, second = plan.facts.rounds
    assert (first["removed"], second["removed"]) == ("blocks.0", "blocks.2")
    assert [len(first["scores"]), len(second["scores"])] == [4, 3]
    assert second["scores"]["blocks.2"] == pytest.approx(1)
    assert PruneDepth(count=2, method="influence").plan(model, context).choice["blocks"].removed == (1, 3)
    assert len(model.blocks) == 4


def test_of_two_streams_the_image_counts():
    """The text comes out turned, the image as it went in: no influence, whichever is longer."""

    class TwoStreamBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Identity()

        def forward(self, hidden_states, encoder_hidden_states):
            return encoder_hidden_states.flip(-1), hidden_states * 2

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([TwoStreamBlock(), TwoStreamBlock()])

        def forward(self, x, text):
            for block in self.blocks:
                text, x = block(hidden_states=x, encoder_hidden_states=text)
            return x

    for tokens in (3, 5):
        calls = [{"x": torch.randn(1, 3, 4), "text": torch.randn(1, tokens, 4)}]
        found = PruneDepth(count=1).plan(Two(), Context(calibration=calls)).facts.influence
        assert found == pytest.approx({"blocks.0": 0, "blocks.1": 0}, abs=1e-9)


# What stays


def test_fixed_and_excluded_blocks_stay_with_reasons():
    from tests.passes.conftest import SUBJECTS

    diffusers = SUBJECTS["diffusers_dit_sdpa"]()
    plan = PruneDepth(count=2).plan(diffusers.model, Context(calibration=[diffusers.inputs]))
    assert plan.choice == {"transformer_blocks": RemovedBlocks(removed=(1,), of=2)}
    assert plan.skipped == {"transformer_blocks.0": "the output layer reads its embedding of the timestep"}

    context = Context(calibration=CALLS)
    plan = PruneDepth(count=3, exclude=("blocks.1",)).plan(Stack(0.5, 0.1, 0.3), context)
    assert plan.choice == {"blocks": RemovedBlocks(removed=(0, 2), of=3)}
    assert plan.skipped == {"blocks.1": "excluded by 'blocks.1'"}
    plan = PruneDepth(count=3, exclude=("*",)).plan(Stack(0.5), context)
    assert plan.skipped == {"blocks.0": "excluded by '*'", "blocks": "each of its blocks stays"}


def test_one_block_always_stays():
    plan = PruneDepth(count=9).plan(Stack(0.5, 0.1, 0.3), Context(calibration=CALLS))
    assert plan.choice == {"blocks": RemovedBlocks(removed=(1, 2), of=3)}


def test_a_stack_that_never_runs_is_left_alone():
    model = Stack(0.5, 0.1)
    model.forward = lambda x: x
    plan = PruneDepth(count=1).plan(model, Context(calibration=CALLS))
    assert plan.choice == {}
    assert "never reach its blocks" in plan.skipped["blocks"]


def test_a_plan_is_replayed_where_there_are_no_weights(subject):
    step, context = PruneDepth(count=1), Context(calibration=[subject.inputs])
    plan = step.plan(subject.model, context)
    assert step.plan(subject.model, context).digest() == plan.digest()
    empty = step.rewrite(subject.copy().to("meta"), Plan.from_json(plan.as_json(), by=step.declared))
    real = step.rewrite(subject.copy(), plan)
    assert empty.state_dict().keys() == real.state_dict().keys() < subject.model.state_dict().keys()


# What a user can mend


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (PruneDepth(), "'influence' needs calibration inputs"),
        (PruneDepth(method="list", blocks=("blocks.7",)), "no block named 'blocks.7'"),
        (PruneDepth(method="list", blocks=("blocks.0",), exclude=("*.0",)), "'blocks.0' must stay: excluded by"),
        (PruneDepth(method="list", blocks=("blocks.0", "blocks.1")), "all 2 blocks of 'blocks' are named"),
        (PruneDepth(exclude=("x",)), "exclude 'x' matches no block"),
    ],
)
def test_what_a_user_can_mend_is_said(step, message):
    with pytest.raises(ToolchainError, match=message):
        step.plan(Stack(0.5, 0.1), Context())


@pytest.mark.parametrize("method", ["influence", "greedy"])
def test_blocks_without_values_cannot_be_judged(method):
    context = Context(calibration=CALLS, score_of=lambda text: lambda model: 0.0)
    with pytest.raises(ToolchainError, match="meta device") as caught:
        PruneDepth(count=1, method=method).plan(Stack(0.5, 0.1).to("meta"), context)
    assert caught.value.where == "blocks"


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ToolchainError, match="influence is not finite"):
        PruneDepth(count=1).plan(Stack(0.5, float("nan")), Context(calibration=CALLS))
    context = Context(score_of=lambda text: lambda model: float("inf"))
    with pytest.raises(ToolchainError, match="score is not finite: inf"):
        PruneDepth(count=1, method="greedy").plan(Stack(0.5, 0.1), context)


def test_a_plan_for_another_stack_is_refused():
    step = PruneDepth(count=1)
    plan = step.plan(Stack(0.5, 0.1), Context(calibration=CALLS))
    with pytest.raises(ToolchainError, match="a stack of 2 blocks; this has 3"):
        step.rewrite(Stack(1, 2, 3), plan)


# What follows


def test_a_shorter_model_exports_runs_and_builds(dit, tmp_path):
    result = PruneDepth(count=1).apply(dit.copy(), Context(calibration=[dit.inputs], example=dit.inputs))
    block = sum(parameter.numel() for parameter in dit.model.blocks[0].parameters())
    assert result.before.parameter_count - result.after.parameter_count == block
    path = exported(result.model, dit.inputs, tmp_path)
    torch.testing.assert_close(in_onnxruntime(path, dit.inputs), dit.output(result.model), atol=1e-4, rtol=0)
    pytest.importorskip("tensorrt_rtx")
    assert (built(path, dit.inputs) / "engine.plan").stat().st_size > 1000
