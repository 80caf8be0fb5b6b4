import copy

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.models.blocks.transformer import SelfAttention
from enginewright.passes.contract import Context, Plan, macs
from enginewright.passes.heads.perturb_heads import PerturbHeads
from enginewright.passes.heads.softpag import Steering
from enginewright.passes.kernel.wrap import around
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8
from enginewright.passes.traits import BlockStack, HeadedAttention, layers_of
from tests.passes.conftest import diffusers_dit, reference_dit
from tests.passes.joint import JOINT, flux, sd3

MODELS = {
    "reference_dit": reference_dit,
    "diffusers_dit": lambda: diffusers_dit("AttnProcessor2_0"),
    "diffusers_dit_eager": lambda: diffusers_dit("AttnProcessor"),
    **JOINT,
}


@pytest.fixture(params=MODELS)
def model(request, calm):
    return MODELS[request.param]()


def perturbed(subject, **settings):
    return PerturbHeads(**settings).apply(subject.copy(), Context()).model


def call(subject, net, **more):
    with torch.no_grad():
        result = net(**subject.inputs, **more)
    return result if isinstance(result, torch.Tensor) else result[0]


def steering_of(net):
    """What the parts of a perturbed model tell one another."""
    return around(net, Steering).call


# What the mechanism does


def test_at_strength_0_nothing_changes(model):
    net = perturbed(model)
    heads = 4 * len(model.paths)

    before = model.output(model.model)

    torch.testing.assert_close(call(model, net, pag_u=torch.zeros(2, heads)), before, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(call(model, net), before, atol=1e-6, rtol=1e-6)
    assert (call(model, net, pag_u=torch.ones(2, heads)) - before).abs().max() > 1e-2


def test_at_strength_1_a_layer_gives_its_projected_values(model):
    """By hand: attention that returns its values; the chosen layer alone."""
    net = perturbed(model, heads={model.paths[-1]: ()})
    by_hand = model.copy()
    layer = dict(layers_of(by_hand, HeadedAttention))[model.paths[-1]]
    for stream in layer.streams:
        tie(*stream.value, *stream.output, layer.heads * layer.head_dim)

    expected = call(model, by_hand)

    torch.testing.assert_close(call(model, net, pag_u=torch.ones(2, 4)), expected, atol=1e-5, rtol=1e-5)
    assert (expected - model.output(model.model)).abs().max() > 1e-2


def tie(values_of, value, reader_of, reader, width):
    """Hand what one projection wrote to another, whatever lay between."""
    seen = []
    getattr(values_of, value).register_forward_hook(lambda module, args, out: seen.append(out[..., -width:]))
    getattr(reader_of, reader).register_forward_pre_hook(
        lambda module, args: torch.cat([seen.pop(), args[0][..., width:]], dim=-1)
    )


def test_one_head_is_blended_and_no_other():
    layer = SelfAttention(8, 4)
    x = torch.randn(2, 5, 8)
    seen = []
    layer.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer(x)
    values = layer.qkv(x)[..., 16:]
    net = PerturbHeads(heads={"attn": (2,)}).apply(Alone(layer), Context()).model

    net(x, pag_u=torch.tensor([[0.25], [1.0]]))

    plain, blended = seen
    own = slice(4, 6)
    assert torch.equal(blended[..., :4], plain[..., :4])
    assert torch.equal(blended[..., 6:], plain[..., 6:])
    torch.testing.assert_close(blended[0, :, own], 0.75 * plain[0, :, own] + 0.25 * values[0, :, own])
    torch.testing.assert_close(blended[1, :, own], values[1, :, own])


class Alone(nn.Module):
    """A model that is one attention layer."""

    def __init__(self, attention):
        super().__init__()
        self.attn = attention

    def forward(self, x):
        return self.attn(x)


def test_the_output_of_one_layer_is_affine_in_the_strength():
    subject = Alone(SelfAttention(8, 4))
    net = PerturbHeads().apply(subject, Context()).model
    x = torch.randn(2, 5, 8)

    low, middle, high = (net(x, pag_u=torch.full((2, 4), u)) for u in (0.0, 0.5, 1.0))

    torch.testing.assert_close(middle - low, high - middle, atol=1e-6, rtol=1e-5)
    assert (high - low).abs().max() > 1e-2


def test_rows_of_a_batch_are_perturbed_each_by_its_own_strength(model):
    net = perturbed(model)
    heads = 4 * len(model.paths)
    u = torch.stack([torch.zeros(heads), torch.ones(heads)])

    mixed = call(model, net, pag_u=u)

    torch.testing.assert_close(mixed[0], model.output(model.model)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], call(model, net, pag_u=torch.ones(2, heads))[1], atol=1e-5, rtol=1e-5)


def test_each_column_of_the_strengths_is_one_head(model):
    path = model.paths[-1]
    u = torch.zeros(2, 4 * len(model.paths))
    u[:, -2] = 1

    found = call(model, perturbed(model), pag_u=u)

    alone = call(model, perturbed(model, heads={path: (2,)}), pag_u=torch.ones(2, 1))
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    assert (found - model.output(model.model)).abs().max() > 1e-3


def test_a_baked_strength_is_the_same_as_a_given_one(model):
    u = torch.full((2, 4 * len(model.paths)), 0.25)

    baked = perturbed(model, u=0.25)

    torch.testing.assert_close(call(model, baked), call(model, perturbed(model), pag_u=u), atol=1e-6, rtol=1e-6)
    with pytest.raises(TypeError, match="pag_u"):
        baked(**model.inputs, pag_u=u)


def test_image_rows_alone():
    """The text's results stay, so the text stream of the last joint block but one sees the image's change only."""
    subject = sd3()
    heads = {"transformer_blocks.1.attn": ()}
    everything, image = (perturbed(subject, heads=heads, rows=rows) for rows in ("all", "image"))
    ones = torch.ones(2, 4)

    results = {}
    for label, net in (("plain", subject.model), ("all", everything), ("image", image)):
        block = net.transformer_blocks[1]
        hook = block.attn.register_forward_hook(lambda m, a, out, label=label: results.setdefault(label, out))
        call(subject, net, **({} if label == "plain" else {"pag_u": ones}))
        hook.remove()

    assert torch.equal(results["image"][1], results["plain"][1])
    assert torch.equal(results["image"][0], results["all"][0])
    assert not torch.allclose(results["all"][1], results["plain"][1])


def test_single_blocks_of_flux_are_left_alone_when_only_image_rows_are_asked_for():
    plan = PerturbHeads(rows="image").plan(flux().model, Context())

    assert set(plan.choice) == {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}
    assert "one row of tokens" in plan.skipped["single_transformer_blocks.0"]


# Guidance in one call


def test_guidance_is_plain_and_perturbed_put_together(model):
    heads = {model.paths[-1]: (0, 2)}
    u = torch.tensor([[0.3, 1.0], [0.7, 0.1]])
    w = torch.tensor([3.0, 0.5])
    plain, other = model.output(model.model), call(model, perturbed(model, heads=heads), pag_u=u)
    expected = plain + w.view(-1, *[1] * (plain.ndim - 1)) * (plain - other)

    net = perturbed(model, heads=heads, guidance=True)

    torch.testing.assert_close(call(model, net, pag_u=u, pag_w=w), expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
    for left_out in ({"pag_u": u}, {"pag_w": w}, {}):
        torch.testing.assert_close(call(model, net, **left_out), plain, atol=1e-6, rtol=1e-6)


def test_blocks_after_the_first_chosen_head_run_again(model):
    heads, u = {model.paths[0]: ()}, torch.ones(2, 4)
    plain, other = model.output(model.model), call(model, perturbed(model, heads=heads), pag_u=u)

    found = call(model, perturbed(model, heads=heads, guidance=True), pag_u=u, pag_w=torch.full((2,), 2.0))

    torch.testing.assert_close(found, plain + 2 * (plain - other), atol=1e-4, rtol=1e-5)


def test_guidance_over_every_head_and_two_stacks(model):
    u, w = torch.full((2, 4 * len(model.paths)), 0.5), torch.full((2,), 2.0)
    plain, other = model.output(model.model), call(model, perturbed(model), pag_u=u)

    found = call(model, perturbed(model, guidance=True), pag_u=u, pag_w=w)

    torch.testing.assert_close(found, plain + 2 * (plain - other), atol=1e-4, rtol=1e-5)


def test_blocks_before_the_first_chosen_head_run_once():
    """DiT of 2 blocks: the first is not computed again unless it holds a chosen head.

    The embeddings and the last layer are computed twice in any case.
    """
    subject = reference_dit()
    net = subject.model
    block = net.blocks[0]
    c = {"x": torch.randn(2, 16, 32), "c": torch.randn(2, 32)}
    one_block, whole = macs(block, c), macs(net, subject.inputs)

    late, early = (
        macs(perturbed(subject, heads={pattern: ()}, guidance=True, u=0.5), subject.inputs)
        for pattern in ("blocks.1.*", "blocks.0.*")
    )

    assert late == 2 * whole - one_block
    assert early == 2 * whole
    plan = PerturbHeads(heads={"blocks.1.*": ()}, guidance=True).plan(net, Context())
    assert plan.facts.blocks_before == {"blocks": 1}


def test_only_leading_channels_are_guided_when_asked():
    subject = reference_dit()
    settings = {"heads": {"blocks.1.attn": ()}, "guidance": True, "u": 1, "w": 2}
    plain = subject.output(subject.model)
    everything, half = (call(subject, perturbed(subject, **settings, channels=n)) for n in (None, 4))

    assert torch.equal(half[:, 4:], plain[:, 4:])
    assert torch.equal(half[:, :4], everything[:, :4])
    assert not torch.allclose(everything[:, 4:], plain[:, 4:])


def test_a_call_that_fails_leaves_nothing_behind():
    subject = reference_dit()
    net = perturbed(subject, guidance=True)
    with pytest.raises(RuntimeError):
        net(**{**subject.inputs, "y": torch.tensor([0, 1, 2])}, pag_u=torch.ones(2, 8), pag_w=torch.ones(2))

    assert steering_of(net).u is None
    assert not steering_of(net).values
    assert not steering_of(net).results
    torch.testing.assert_close(call(subject, net), subject.output(subject.model), atol=1e-6, rtol=1e-6)


# What a plan says


def test_a_plan_names_the_heads_in_the_order_of_the_input_and_is_replayed(model):
    step = PerturbHeads(heads={"*": (1, 3)})
    plan = step.plan(model.model, Context())
    replayed = Plan.from_json(plan.as_json(), by=step.declared)

    assert list(plan.facts.heads) == [f"{path}:{head}" for path in model.paths for head in (1, 3)]
    (new,) = step.new_inputs(replayed)
    assert (new.name, new.shape, new.dtype, new.default) == ("pag_u", (2 * len(model.paths),), "float32", 0)
    u = torch.rand(2, *new.shape)
    one, two = (call(model, step.rewrite(model.copy(), each), pag_u=u) for each in (plan, replayed))
    assert torch.equal(one, two)


def test_what_it_adds_depends_on_what_is_baked():
    plan = PerturbHeads().plan(reference_dit().model, Context())
    names = {
        (u, guidance, w): [each.name for each in PerturbHeads(u=u, guidance=guidance, w=w).new_inputs(plan)]
        for u, guidance, w in ((None, False, None), (1, False, None), (None, True, None), (None, True, 3), (1, True, 3))
    }
    assert list(names.values()) == [["pag_u"], [], ["pag_u", "pag_w"], ["pag_u"], []]


def test_each_layer_left_alone_has_its_reason():
    from diffusers.models.attention_processor import Attention

    net = nn.ModuleDict(
        {
            "taken": SelfAttention(8, 4),
            "other": SelfAttention(8, 4),
            "crossed": Attention(query_dim=32, cross_attention_dim=12, heads=4, dim_head=8),
            "foreign": nn.MultiheadAttention(8, 4),
        }
    )
    plan = PerturbHeads(heads={"taken": (), "crossed": ()}).plan(net, Context())

    assert list(plan.choice) == ["taken"]
    assert plan.skipped == {
        "foreign": "no family knows how the heads of a MultiheadAttention are laid out",
        "crossed": "its values are of other tokens than its queries, so it has no identity map",
        "other": "none of its heads was asked for",
    }


def test_a_model_without_attention_is_left_alone():
    net = nn.Sequential(nn.Linear(2, 2))
    step = PerturbHeads(heads={})

    result = step.apply(net, Context())

    assert result.changed == ()
    assert step.new_inputs(result.plan) == ()
    assert type(result.model) is nn.Sequential


# What follows


def test_the_rewritten_model_is_still_a_stack_of_blocks_with_the_same_paths(model):
    before = {path: len(stack.blocks) for path, stack in layers_of(model.model, BlockStack)}
    net = perturbed(model, guidance=True)

    assert {path: len(stack.blocks) for path, stack in layers_of(net, BlockStack)} == before
    assert isinstance(net, type(model.model))
    assert set(dict(model.model.named_modules())) <= set(dict(net.named_modules()))


def test_a_copy_is_a_model_of_its_own(model):
    net = perturbed(model, guidance=True)
    twin = copy.deepcopy(net)
    more = {"pag_u": torch.ones(2, 4 * len(model.paths)), "pag_w": torch.ones(2)}

    assert torch.equal(call(model, net, **more), call(model, twin, **more))
    assert steering_of(net) is not steering_of(twin)


def test_8_bits_come_afterwards_and_the_heads_are_still_perturbed():
    subject = reference_dit()
    context = Context(calibration=[subject.inputs])
    net = perturbed(subject)
    result = QuantizeInt8().apply(net, context)
    assert "blocks.0.attn.proj.linear" in result.changed

    u = torch.ones(2, 8)
    exact = call(subject, perturbed(subject), pag_u=u)
    found = call(subject, result.model, pag_u=u)

    assert (found - exact).norm() / exact.norm() < 0.1
    assert (found - subject.output(subject.model)).norm() / exact.norm() > 0.2


# What a user can mend


def test_a_pattern_without_a_layer_and_a_head_that_is_not_there():
    net = reference_dit().model
    with pytest.raises(ToolchainError, match="heads 'attn' matches no attention layer"):
        PerturbHeads(heads={"attn": ()}).plan(net, Context())
    with pytest.raises(ToolchainError, match="asks for head 4; this layer has 0 to 3") as caught:
        PerturbHeads(heads={"*": (1, 4)}).plan(net, Context())
    assert caught.value.where == "blocks.0.attn"


def test_a_plan_for_another_model_is_refused():
    step = PerturbHeads()
    plan = step.plan(nn.ModuleDict({"attn": SelfAttention(8, 4)}), Context())

    with pytest.raises(ToolchainError, match="for a layer of 4 heads; this one has 2"):
        step.rewrite(nn.ModuleDict({"attn": SelfAttention(8, 2)}), plan)


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ToolchainError, match="w is 3; it needs guidance = true"):
        PerturbHeads(w=3)
    with pytest.raises(ToolchainError, match="channels is 4; it needs guidance = true"):
        PerturbHeads(channels=4)
    with pytest.raises(ToolchainError, match=r"u is 1\.5"):
        PerturbHeads(u=1.5)
