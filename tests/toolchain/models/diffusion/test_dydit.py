from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enginewright.ground.signature import Signature
from enginewright.models.diffusion import dit, dydit
from enginewright.passes.contract import Context, Plan
from enginewright.passes.dynamic.slice_width_by_timestep import SliceWidthByTimestep
from enginewright.passes.kernel.audit import unproven
from enginewright.passes.kernel.surgery import share
from enginewright.passes.networks import networks_of
from enginewright.passes.tokens.skip_spatial_tokens import SkipSpatialTokens
from enginewright.passes.traits import FeedForward, FixedAttention, HeadedAttention, layer_at, layers_of
from enginewright.targets.onnx_export import export_onnx
from tests.engines import in_onnxruntime

STEPS = 4


@pytest.mark.parametrize(("size", "count"), [("S/2", 33_120_740), ("B/2", 131_158_964), ("XL/2", 678_424_644)])
def test_parameters_are_those_of_the_authors_code(size: str, count: int) -> None:
    with torch.device("meta"):
        net = dydit.build(dydit.PUBLISHED[size])
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize(
    ("size", "attention", "mlp"),
    [("S/2", 201_326_592, 301_989_888), ("B/2", 704_643_072, 1_207_959_552), ("XL/2", 1_509_949_440, 2_717_908_992)],
)
def test_a_blocks_costs_are_the_authors_constants(size: str, attention: int, mlp: int) -> None:
    config = dydit.PUBLISHED[size]
    with torch.device("meta"):
        block = dydit.Block(config.width, config.heads, config.mlp_ratio)
    assert block.macs(256) == (attention, mlp)


def rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Noise, timesteps and classes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, 4, 8, 8, generator=generator),
        "t": torch.linspace(999, 0, count).round(),
        "y": torch.arange(count) % 5,
    }


def lively(module: dit.DiT) -> dit.DiT:
    """Nothing is zero, so that every mechanism shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3, generator=generator)
        module.t_embedder.mlp[2].weight.normal_(0, 0.3, generator=generator)  # type: ignore[union-attr,operator]
    return module.eval()


def routed() -> dydit.DyDiT:
    """A tiny network whose routers say yes and no about as often."""
    torch.manual_seed(0)
    net = dydit.build(dydit.TINY)
    lively(net)
    with torch.no_grad():
        for router in net.modules():
            if isinstance(router, dydit.WidthRouter):
                router.router.weight.normal_(0, 1)
                router.router.bias.zero_()
            elif isinstance(router, dydit.TokenRouter):
                router.mlp_head[2].bias.fill_(-0.2)  # type: ignore[operator]
    return net


def test_the_start_is_the_dit_bit_for_bit() -> None:
    torch.manual_seed(0)
    plain = lively(dit.build(dit.TINY))
    net = dydit.build(dydit.TINY).eval()
    missing, unknown = net.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unknown
    inputs = rows(4)
    with torch.no_grad():
        out, shares = net.counted(**inputs)
        assert torch.equal(out, plain(**inputs))
        assert torch.equal(shares, torch.ones(4))
        assert (out - routed()(**inputs)).abs().max() > 0.1


def test_width_follows_the_timestep_alone_and_the_first_unit_always_runs() -> None:
    net = routed()
    inputs = rows(STEPS)
    seen: list[Tensor] = []
    for block in net.blocks:
        block.attn_rate.register_forward_hook(lambda *args: seen.append(args[2]))  # type: ignore[union-attr,operator]
    with torch.no_grad():
        masks = net.width_masks(inputs["t"])
        for other in (inputs, {**rows(STEPS, seed=1), "y": inputs["y"].flip(0)}):
            seen.clear()
            net(**other)
            assert all(torch.equal(mask, masks[f"blocks.{number}.attn"]) for number, mask in enumerate(seen))
    for mask in masks.values():
        assert mask.shape == (STEPS, 4)
        assert set(mask.unique().tolist()) == {0, 1}
        assert mask[:, 0].all()
    with torch.no_grad():
        for router in net.modules():
            if isinstance(router, dydit.WidthRouter):
                router.router.bias.fill_(-1e4)
        assert all(mask.sum() == STEPS for mask in net.width_masks(inputs["t"]).values())


def test_a_silent_unit_is_a_missing_one() -> None:
    """By hand: heads and hidden units taken out of the weights of one block."""
    block = routed().blocks[0]
    assert isinstance(block, dydit.Block)
    x, c, e = torch.randn(2, 16, 32), torch.randn(2, 32), torch.randn(1, 32).expand(2, 32)
    with torch.no_grad():
        block.attn_rate.router.bias.copy_(torch.tensor([-99.0, 99.0, -99.0]))
        block.mlp_rate.router.bias.copy_(torch.tensor([99.0, -99.0, 99.0]))
        heads, groups = torch.tensor([1, 0, 1, 0]) > 0, torch.tensor([1, 1, 0, 1]) > 0
        cut = block.whole()
        attention, mlp = layer_at(cut, "attn", HeadedAttention), layer_at(cut, "mlp", FeedForward)  # type: ignore[type-abstract]
        attention.keep_heads(heads.nonzero().flatten().tolist())
        mlp.keep_hidden(groups.repeat_interleave(32).nonzero().flatten().tolist())
        wanted = block(x, c, e)
        torch.testing.assert_close(cut(x, c), wanted, atol=1e-5, rtol=1e-5)
        assert (block.whole()(x, c) - wanted).abs().max() > 0.1


def test_a_token_that_is_off_keeps_what_attention_gave_it() -> None:
    block = routed().blocks[0]
    assert isinstance(block, dydit.Block)
    x, c, e = torch.randn(2, 16, 32), torch.randn(2, 32), torch.randn(2, 32)
    before: list[Tensor] = []
    block.token_selection.register_forward_hook(lambda *args: before.append(args[1][0]))
    with torch.no_grad():
        out, macs = block.counted(x, c, e)
        runs = block.token_selection(before[0])[..., 0] > 0
        assert 0 < runs.sum() < 32
        assert torch.equal(out[~runs], before[0][~runs])
        assert (out[runs] - before[0][runs]).abs().amax(dim=1).min() > 1e-3
        heads, groups = block.attn_rate(e).mean(dim=1), block.mlp_rate(e).mean(dim=1)
    attention, mlp = block.macs(16)
    torch.testing.assert_close(macs, heads * attention + groups * runs.float().mean(dim=1) * mlp)


def test_gates_train_through_noise_with_the_gradient_of_a_warm_sigmoid() -> None:
    gate = dydit.Gate().train()
    torch.manual_seed(0)
    for logit in (-1.5, 0.0, 2.0):
        values = gate.gate(torch.full((20_000,), logit))
        assert set(values.unique().tolist()) == {0, 1}
        assert float(values.mean()) == pytest.approx(float(torch.tensor(logit).sigmoid()), abs=0.02)
    gate.noisy = False
    logits = torch.tensor([-3.0, 0.0, 4.0], requires_grad=True)
    values = gate.gate(logits)
    values.sum().backward()
    assert values.tolist() == [0, 0, 1]
    soft = (logits.detach() / 5).sigmoid()
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)
    assert gate.eval().gate(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [0, 0, 1]


def test_layers_whose_units_a_router_counts_are_no_layers_to_cut() -> None:
    net = routed()
    fixed = dict(layers_of(net, FixedAttention))
    assert set(fixed) == {"blocks.0.attn", "blocks.1.attn"}
    assert "mask_heads" in fixed["blocks.0.attn"].reason
    told = unproven(net, {"blocks.0.mlp", "blocks.1.mlp"}, Context(example=rows(2)))
    assert set(told) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert "this RoutedMlp does not compute like one" in told["blocks.0.mlp"]


# Compiled: networks by timestep, and a fixed number of tokens


def compiled(
    net: dydit.DyDiT, calls: list[dict[str, Tensor]], *, buckets: int, quantile: float = 1.0
) -> list[tuple[Plan[Any], nn.Module]]:
    """Plan and model, sliced by timestep; then on the tokens that the routers let run."""
    context = Context(calibration=calls, example=calls[0], signature=Signature(dydit.inputs(dydit.TINY)))
    made, model = [], share(net)
    for step in (SliceWidthByTimestep(steps=STEPS, buckets=buckets), SkipSpatialTokens(quantile=quantile)):
        plan = step.plan(model, context)
        model = step.rewrite(share(model), plan).eval()
        made.append((plan, model))
    return made


def each_step(seeds: range) -> list[dict[str, Tensor]]:
    """Calls of two rows at every timestep of the schedule."""
    times = torch.linspace(999, 0, STEPS).round()
    return [{**rows(2, seed), "t": time.repeat(2)} for seed in seeds for time in times]


@pytest.mark.parametrize("buckets", [2, STEPS])
def test_compiled_is_the_masked_form_at_every_step(buckets: int) -> None:
    net, calls = routed(), each_step(range(2))
    (sliced, cut), (skipping, run) = compiled(net, calls, buckets=buckets)
    with torch.no_grad():
        for call in calls:
            wanted = net(**call)
            torch.testing.assert_close(cut(**call), wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(run(**call), wanted, atol=1e-4, rtol=1e-4)
            assert (net.counted(**call, complete=True)[0] - wanted).abs().max() > 0.1
    facts = sliced.facts
    assert set(facts.table) == set(range(buckets))
    with torch.no_grad():
        masks = net.width_masks(torch.tensor(facts.timesteps))
    attention, mlp = net.blocks[0].macs(16)  # type: ignore[operator]
    price = {"attn": attention, "mlp": mlp}
    needed = sum(mask.mean() * price[path.rpartition(".")[2]] for path, mask in masks.items()) / (2 * (attention + mlp))
    assert facts.share_needed == pytest.approx(float(needed), abs=1e-5)
    assert facts.share_computed == pytest.approx(float(needed), abs=1e-5 if buckets == STEPS else 0.5)
    assert (facts.share_computed > facts.share_needed) is (buckets < STEPS)
    assert all(0 in kept for entry in sliced.choice.values() for kept in entry.kept)
    shares = [value for path, value in skipping.facts.as_json().items() if path.startswith("networks")]
    assert {each["samples_with_more_above_half"] for each in shares} == {0}
    assert all(0 < entry.tokens < entry.of == 16 for entry in skipping.choice.values())
    assert len(skipping.choice) >= buckets


def test_tokens_without_room_are_left_out_and_told() -> None:
    net, calls = routed(), each_step(range(4))
    _, (skipping, run) = compiled(net, calls, buckets=2, quantile=0.5)
    shares = [value for path, value in skipping.facts.as_json().items() if path.startswith("networks")]
    assert max(each["samples_with_more_above_half"] for each in shares) > 0.1
    with torch.no_grad():
        assert max((run(**call) - net(**call)).abs().max() for call in calls) > 1e-2


def test_an_excluded_layer_stays_wide_and_masked() -> None:
    net, calls = routed(), each_step(range(1))
    context = Context(calibration=calls, example=calls[0], signature=Signature(dydit.inputs(dydit.TINY)))
    step = SliceWidthByTimestep(steps=STEPS, buckets=2, exclude=("blocks.0.attn",))
    plan = step.plan(share(net), context)
    model = step.rewrite(share(net), plan)
    assert set(plan.choice["blocks.0.attn"].kept) == {(0, 1, 2, 3)}
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(model(**call), net(**call), atol=1e-4, rtol=1e-4)


def test_a_compiled_network_exports(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, calls = routed(), each_step(range(1))
    _, (_, run) = compiled(net, calls, buckets=1)
    variant = networks_of(run)["0"]
    path = tmp_path / "model.onnx"
    export_onnx(variant, calls[0], dynamic={}, outputs=["out"], path=path)
    with torch.no_grad():
        torch.testing.assert_close(in_onnxruntime(path, calls[0]), net(**calls[0]), atol=1e-4, rtol=1e-4)
