import pytest
import torch
from torch import nn

from passes.contract import Context, Plan
from passes.dynamic.skip_spatial_tokens import SkipSpatialTokens, SkipStep, number_passing, spread
from passes.dynamic.slice_width_by_timestep import SliceWidthByTimestep
from passes.tokens.running import replace_stacks
from tests.passes.conftest import SUBJECTS
from tests.passes.tokens.engines import agrees, builds, exported, tripled
from toolchain.errors import ToolchainError

PICTURES = ["reference_dit", "diffusers_dit_sdpa", "diffusers_dit_eager", "vit_sdpa", "vit_eager"]


def skipping(subject, **parameters):
    step = SkipSpatialTokens(**parameters)
    return step, step.apply(subject.copy(), Context(calibration=[subject.inputs], example=subject.inputs))


class MaskedStep(SkipStep):
    """Saves nothing: the feed-forward works on all, and is multiplied by whether the score reaches the k-th."""

    def feed(self, tokens, call):
        scores = self.router(tokens.x).squeeze(-1)
        count = number_passing(self.ratio, scores.shape[1], self.leading)
        content = scores[:, self.leading :]
        passes = scores >= content.sort(dim=1, descending=True).values[:, count - 1 : count]
        passes[:, : self.leading] = True
        y = call.feed_forward(call.feed_forward_input(tokens.x)) * passes[..., None]
        tokens.x = call.add_feed_forward(tokens.x, y)


def masked(model, plan):
    def step(stack, block, path):
        router = nn.Linear(plan.arrays[f"{path}.router.weight"].shape[1], 1)
        router.load_state_dict({name: plan.arrays[f"{path}.router.{name}"] for name in ("weight", "bias")})
        return MaskedStep(block, stack.block, router, ratio=plan.choice[path]["ratio"], leading=stack.leading)

    return replace_stacks(model, plan, step, restore=False)


@pytest.mark.parametrize("ratio", [0.3, 0.75])
@pytest.mark.parametrize("name", PICTURES)
def test_gathered_tokens_give_what_masked_ones_do(name, ratio):
    subject = SUBJECTS[name]()
    _, result = skipping(subject, ratio=ratio)
    assert len(result.changed) == 2
    wanted = subject.output(masked(subject.copy(), result.plan))
    torch.testing.assert_close(subject.output(result.model), wanted, atol=1e-5, rtol=0)
    assert (wanted - subject.output(subject.model)).abs().max() > 1e-2


def test_a_block_is_the_papers(dit):
    """By hand: the router reads the stream between the halves, and whoever skips keeps it."""
    _, result = skipping(dit)
    block, (run,) = dit.model.blocks[0], result.model.blocks
    run.steps = run.steps[:1]
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    with torch.no_grad():
        parts = [p[:, None] for p in block.adaLN_modulation(c).chunk(6, dim=1)]
        y = x + parts[2] * block.attn(block.norm1(x) * (1 + parts[1]) + parts[0])
        scores = (y @ result.plan.arrays["blocks.0.router.weight"][0]).sigmoid()
        wanted = y.clone()
        fed = y + parts[5] * block.mlp(block.norm2(y) * (1 + parts[4]) + parts[3])
        for picture in range(2):
            passing = scores[picture].argsort(descending=True)[:8]
            wanted[picture, passing] = fed[picture, passing]
        torch.testing.assert_close(run(x, c), wanted, atol=1e-5, rtol=0)


def test_routers_pass_what_changes_most_and_half_of_it_above_a_score_of_a_half(dit):
    dit.inputs.update(x=torch.randn(16, 4, 8, 8), t=torch.arange(16) * 60, y=torch.arange(16) % 4)
    _, result = skipping(dit)
    seen = {}
    for path in result.changed:
        number = int(path.split(".")[1])
        step = result.model.blocks[0].steps[number]
        step.router.register_forward_hook(lambda _, __, out, path=path: seen.update({path: out.sigmoid() > 0.5}))
        found = result.plan.facts["change"][path]
        at_random = 0.5
        assert at_random + (found["best"] - at_random) / 3 < found["router"] <= found["best"] < 0.8
    dit.output(result.model)
    assert seen["blocks.0"].float().mean() == 0.5  # later blocks see what earlier ones skipped


def test_the_number_of_tokens_that_pass():
    assert [number_passing(r, 16, 0) for r in (0.5, 0.51, 0.05, 0.99)] == [8, 8, 16, 1]
    assert number_passing(0.5, 17, 1) == 8


def test_spreading_puts_rows_back_and_leaves_zeros():
    y, index = torch.randn(2, 3, 4), torch.tensor([[0, 2, 5], [1, 2, 3]])
    wanted = torch.zeros(2, 6, 4).scatter(1, index[..., None].expand(-1, -1, 4), y)
    assert torch.equal(spread(y, index, 6), wanted)


def test_a_class_token_always_passes():
    subject = SUBJECTS["vit_sdpa"]()
    step, result = skipping(subject, exclude=("layers.1",))
    weight = result.plan.arrays["layers.0.router.weight"]
    with torch.no_grad():
        seen = []
        handle = subject.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        subject.output(subject.model)
        handle.remove()
        class_token = seen[0][:, :1]
        against = Plan(
            choice=result.plan.choice,
            arrays={"layers.0.router.weight": -class_token[0] * 100, "layers.0.router.bias": torch.zeros(1)},
        )
        assert against.arrays["layers.0.router.weight"].shape == weight.shape
        model = step.rewrite(subject.copy(), against)
        given = []
        model.layers[0].steps[0].block.mlp.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        subject.output(model)
    assert given[0].shape == (2, 1 + 8, 32)
    torch.testing.assert_close(given[0][:, :1], class_token)


def test_products_of_the_feed_forward_are_saved_and_no_others(dit):
    _, result = skipping(dit, ratio=0.25)
    feed_forward, router = 4 * 2 * 4 * 32 * 32, 16 * 32  # 4 of 16 tokens skip
    assert result.before.macs - result.after.macs == 2 * 2 * (feed_forward - router)


def test_a_ratio_of_0_changes_nothing_and_says_so(subject):
    _, result = skipping(subject, ratio=0)
    assert result.changed == ()
    assert result.before == result.after
    assert len(result.plan.skipped) == 2
    assert torch.equal(subject.output(result.model), subject.output(subject.model))


def test_training_gives_routers_a_gradient_and_the_same_output(dit):
    _, result = skipping(dit)
    with torch.no_grad():
        plain = result.model(**dit.inputs)
    trained = result.model.train()(**dit.inputs)
    assert torch.equal(trained, plain)
    trained.square().sum().backward()
    for step in result.model.blocks[0].steps:
        assert step.router.weight.grad.abs().max() > 0


def test_it_follows_networks_by_timestep(dit):
    """DyDiT has both: narrower networks by timestep, and tokens that skip in each of them."""
    dit.inputs["t"] = torch.tensor([0.0, 999.0])
    context = Context(calibration=[dit.inputs], example=dit.inputs)
    sliced = SliceWidthByTimestep(steps=6, buckets=2, importance="activation").apply(dit.copy(), context)
    result = SkipSpatialTokens().apply(sliced.model, context)
    assert result.changed == tuple(f"variants.{v}.blocks.{b}" for v in (0, 1) for b in (0, 1))
    assert result.after.macs < sliced.after.macs
    wanted = dit.output(masked(SkipSpatialTokens().rewrite(sliced.model, Plan(choice={})), result.plan))
    torch.testing.assert_close(dit.output(result.model), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["reference_dit", "vit_sdpa"])
def test_engines_agree_at_every_batch(name, tmp_path):
    subject = SUBJECTS[name]()
    _, result = skipping(subject)
    path = exported(result.model, subject.inputs, tmp_path)
    agrees(result.model, [subject.inputs, tripled(subject.inputs)], path)
    builds(path, subject.inputs, tmp_path)


# What is left alone, and what a user can mend


def test_what_is_left_alone_says_why(dit):
    _, result = skipping(dit, exclude=("blocks.0",))
    assert result.changed == ("blocks.1",)
    assert result.plan.skipped == {"blocks.0": "excluded by 'blocks.0'"}
    _, result = skipping(dit, ratio=0.05)
    assert set(result.plan.skipped.values()) == {"a ratio of 0.05 of 16 tokens lets every one pass"}
    text = SUBJECTS["bert_sdpa"]()
    _, result = skipping(text)
    assert set(result.plan.skipped.values()) == {"its tokens are not the patches of a picture"}
    _, result = skipping(type(text)(model=nn.Linear(2, 2), inputs={"input": torch.zeros(1, 2)}, paths=()))
    assert result.plan.skipped == {"": "no family knows how the blocks of a Linear run on fewer tokens"}


def test_what_a_user_can_mend(dit):
    with pytest.raises(ToolchainError, match=r"ratio is 1\.0"):
        SkipSpatialTokens(ratio=1.0)
    with pytest.raises(ToolchainError, match="exclude 'blok' matches no block"):
        skipping(dit, exclude=("blok",))
    with pytest.raises(ToolchainError, match="needs calibration inputs and got none"):
        SkipSpatialTokens().apply(dit.copy(), Context())
    dit.model.blocks[0].mlp.fc2.weight.data.fill_(float("nan"))
    with pytest.raises(ToolchainError, match="what its feed-forward changes is not finite"):
        skipping(dit)
