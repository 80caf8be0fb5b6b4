import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.models.diffusion.dit import Config, DiT
from enginewright.passes.contract import Context, Plan
from enginewright.passes.moe.mixture_of_blocks import KeptBlocks, MixtureOfBlocks, smaller
from enginewright.passes.networks import Networks, networks_of
from enginewright.passes.traits import BlockStack, layer_at
from tests.passes.conftest import randomise
from tests.passes.joint import flux, sharing


@pytest.fixture
def deep(calm):
    """A DiT of six blocks."""
    return randomise(DiT(Config(depth=6, width=16, heads=2, side=8, classes=4)))


def calls(count=4, low=0, high=1000):
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "x": torch.randn(2, 4, 8, 8, generator=generator),
            "t": torch.randint(low, high, (2,), generator=generator),
            "y": torch.tensor([0, 3]),
        }
        for _ in range(count)
    ]


def passed_by(model, path, kept):
    """A copy in which the other blocks give back what they were given."""
    twin = copy.deepcopy(model)
    for number, block in enumerate(layer_at(twin, path, BlockStack).blocks):
        if number not in kept:
            block.forward = lambda x, *rest, **named: x
    return twin


@torch.no_grad()
def run(model, inputs):
    return model(**inputs)


# Exactness


def test_blocks_taken_out_are_blocks_passed_by_in_every_bucket(deep):
    context = Context(calibration=calls())
    for bucket in range(4):
        result = MixtureOfBlocks(bucket=bucket).apply(copy.deepcopy(deep), context)
        kept = result.plan.choice["blocks"].kept
        assert result.changed == ("blocks",)
        assert len(result.model.blocks) == 3
        assert [block // 2 for block in kept] == [0, 1, 2]
        for inputs in context.calibration:
            found = run(result.model, inputs)
            assert torch.equal(found, run(passed_by(deep, "blocks", kept), inputs))
            assert not torch.equal(found, run(deep, inputs))
            assert torch.equal(found, run(smaller(deep, result.plan, bucket), inputs))
    assert len(deep.blocks) == 6


def test_the_first_block_of_diffusers_dit_stays(subject):
    step = MixtureOfBlocks(buckets=1)
    plan = step.plan(subject.model, Context(calibration=[subject.inputs]))
    [(path, entry)] = plan.choice.items()
    assert len(entry.kept) == 1
    if path == "transformer_blocks":
        assert entry.kept == (0,)
    assert not torch.equal(subject.output(step.rewrite(subject.copy(), plan)), subject.output(subject.model))


def test_all_of_a_group_is_the_whole_model_and_says_so(deep):
    result = MixtureOfBlocks(group=3, keep=3).apply(copy.deepcopy(deep), Context(calibration=calls(1)))
    assert result.changed == ()
    assert result.plan.skipped == {"blocks": "all of its 6 blocks run where 3 of each 3 are kept"}
    assert torch.equal(run(result.model, calls(1)[0]), run(deep, calls(1)[0]))


# The choice


def test_silent_blocks_go(deep):
    for silent in (0, 3, 4):
        with torch.no_grad():
            for parameter in deep.blocks[silent].adaLN_modulation[1].parameters():
                parameter.zero_()
    result = MixtureOfBlocks().apply(copy.deepcopy(deep), Context(calibration=calls()))
    assert result.plan.choice["blocks"] == KeptBlocks(kept=(1, 2, 5), of=6)
    assert [row.agreement["blocks"] for row in result.plan.facts.buckets] == [1.0] * 4
    assert torch.equal(run(result.model, calls()[0]), run(deep, calls()[0]))


class Timed(nn.Module):
    """Each of two blocks speaks at one end of the timesteps only."""

    class Block(nn.Module):
        def __init__(self, early):
            super().__init__()
            self.attn = self.mlp = nn.Identity()
            self.early = early

        def forward(self, x, t):
            speaks = (t < 500) if self.early else (t >= 500)
            return x + speaks.float()[:, None]

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(True), self.Block(False)])

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x, timestep)
        return x


def test_each_range_of_timesteps_keeps_what_matters_there():
    times = torch.tensor([10.0, 200, 499, 501, 700, 990, 1200])
    context = Context(calibration=[{"x": torch.ones(7, 3), "timestep": times}])
    plan = MixtureOfBlocks(buckets=2, bucket=1).plan(Timed(), context)
    first, second = plan.facts.buckets
    assert (first.kept, second.kept) == ({"blocks": [0]}, {"blocks": [1]})
    assert (first.samples, second.samples) == (3, 4)
    assert (first.low, first.high, second.high) == (0, 500, 1000)
    assert plan.choice["blocks"].kept == (1,)

    together = MixtureOfBlocks(buckets=1).plan(Timed(), context).facts.buckets[0]
    assert together.kept == {"blocks": [1]}
    assert together.agreement["blocks"] == round(4 / 7, 6)


def test_a_range_that_no_sample_falls_into_takes_all_samples():
    context = Context(calibration=[{"x": torch.ones(3, 3), "timestep": torch.tensor([1.0, 2, 900])}])
    rows = MixtureOfBlocks(buckets=4).plan(Timed(), context).facts.buckets
    assert [row.samples for row in rows] == [2, 0, 0, 1]
    assert [row.kept["blocks"] for row in rows] == [[0], [0], [0], [1]]


def test_one_timestep_may_serve_a_batch_and_a_last_group_may_be_short():
    context = Context(calibration=[{"x": torch.ones(3, 3), "timestep": torch.tensor([700.0])}])
    model = Timed()
    model.blocks.append(Timed.Block(False))
    plan = MixtureOfBlocks(buckets=2).plan(model, context)
    assert plan.facts.buckets[1].samples == 3
    assert plan.facts.buckets[1].kept["blocks"] == [1, 2]


def test_double_and_single_blocks_are_chosen_apart():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.rand(2),
        "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    plan = MixtureOfBlocks(group=3, keep=2, high=1.0).plan(model, Context(calibration=[inputs]))
    for row in plan.facts.buckets:
        sizes = {path: len(kept) for path, kept in row.kept.items()}
        assert sizes == {"transformer_blocks": 2, "single_transformer_blocks": 3}
    with torch.no_grad():
        assert smaller(model, plan, 0)(**inputs).sample.isfinite().all()


# Faults


def test_what_cannot_be_is_refused(deep):
    with pytest.raises(ToolchainError, match="keep is 3; a group has 2 blocks"):
        MixtureOfBlocks(keep=3)
    with pytest.raises(ToolchainError, match="bucket is 4; there are 4 buckets"):
        MixtureOfBlocks(bucket=4)
    with pytest.raises(ToolchainError, match=r"high is 0.0; low is 0.0"):
        MixtureOfBlocks(high=0.0)
    context = Context(calibration=calls(1))
    with pytest.raises(ToolchainError, match="no input named 'sigma'") as caught:
        MixtureOfBlocks(timestep="sigma").plan(deep, context)
    assert "t, x, y" in str(caught.value)
    with pytest.raises(ToolchainError, match="'nothing' matches no stack of blocks"):
        MixtureOfBlocks(exclude=("nothing",)).plan(deep, context)
    with pytest.raises(ToolchainError, match="needs calibration inputs"):
        MixtureOfBlocks().apply(deep, Context())
    plan = MixtureOfBlocks().plan(deep, context)
    once = MixtureOfBlocks(bucket=0).apply(copy.deepcopy(deep), context).model
    with pytest.raises(ToolchainError, match="for a stack of 6 blocks; this one has 3"):
        MixtureOfBlocks().rewrite(once, plan)
    with torch.no_grad():
        deep.blocks[0].mlp.fc1.weight[0] = float("nan")
    with pytest.raises(ToolchainError, match="is not finite"):
        MixtureOfBlocks().plan(deep, context)


def test_what_is_left_alone_is_named(deep):
    context = Context(calibration=calls(1))
    assert MixtureOfBlocks(exclude=("blocks",)).plan(deep, context).skipped == {"blocks": "excluded by 'blocks'"}
    none = MixtureOfBlocks(buckets=1).plan(nn.Linear(2, 2), Context(calibration=[{"input": torch.ones(1, 2)}]))
    assert none.skipped == {"": "no family knows a stack of blocks in it"}


# All ranges in one model


def timed_calls():
    return [{"x": torch.ones(4, 3), "timestep": torch.tensor([10.0, 400, 600, 990])}]


def test_every_timestep_runs_the_network_of_its_range():
    result = MixtureOfBlocks(buckets=2).apply(Timed(), Context(calibration=timed_calls()))
    assert isinstance(result.model, Networks)
    assert len(list(networks_of(result.model).values())) == 2
    assert result.plan.choice["blocks"].kept == ((0,), (1,))
    # Each range keeps the block that speaks there, so what comes out is what both blocks give: at the borders too.
    times = torch.tensor([0.0, 499.9, 500, 999, 1000, 1500])
    x = torch.zeros(6, 3)
    assert torch.equal(run(result.model, {"x": x, "timestep": times}), run(Timed(), {"x": x, "timestep": times}))


def test_ranges_of_the_same_blocks_share_a_network():
    model = MixtureOfBlocks(buckets=4).apply(Timed(), Context(calibration=timed_calls())).model
    assert len(list(networks_of(model).values())) == 2
    assert model.program.table.ways == (1, 1, 0, 0)
    assert model.program.table.timesteps == (875, 625, 375, 125)


def test_in_every_range_the_whole_model_is_its_own_network(deep):
    context = Context(calibration=calls())
    step = MixtureOfBlocks()
    plan = step.plan(deep, context)
    whole = step.rewrite(copy.deepcopy(deep), Plan.from_json(plan.as_json(), by=step.declared))
    for bucket in range(4):
        inputs = {**calls(1)[0], "t": torch.full((2,), 250 * bucket + 3)}
        assert torch.equal(run(whole, inputs), run(smaller(deep, plan, bucket), inputs))


def test_a_model_that_counts_timesteps_to_one_is_cut_there_and_empty_ranges_are_named():
    times = torch.tensor([0.1, 0.2, 0.9])
    context = Context(calibration=[{"x": torch.ones(3, 3), "timestep": times}])
    for known in (context, replace(context, signature=sharing(timestep=(0, 1)))):
        plan = MixtureOfBlocks().plan(Timed(), known)
        assert [row.high for row in plan.facts.buckets] == [0.25, 0.5, 0.75, 1]
        assert [row.samples for row in plan.facts.buckets] == [2, 0, 0, 1]
        assert "no calibration sample has a timestep of 0.25 to 0.5, 0.5 to 0.75" in plan.facts.notes[0]


def test_what_holds_no_timestep_is_refused(deep):
    with pytest.raises(ToolchainError, match=r"input 'x' has shape \(2, 4, 8, 8\); one a row is needed"):
        MixtureOfBlocks(timestep="x").plan(deep, Context(calibration=calls(1)))


def test_flux_keeps_its_position_ids_whole_while_rows_part():
    subject = flux()
    context = Context(calibration=[subject.inputs], signature=sharing("img_ids", "txt_ids", timestep=(0, 1)))
    model = MixtureOfBlocks(buckets=2).apply(subject.copy(), context).model
    with torch.no_grad():
        mixed = model(**subject.inputs)[0]
        for row in range(2):
            own = {n: v if n.endswith("_ids") else v[row : row + 1] for n, v in subject.inputs.items()}
            torch.testing.assert_close(model(**own)[0][0], mixed[row], atol=1e-5, rtol=1e-5)
