from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enginewright.models.vision import fit
from enginewright.passes.contract import macs_of_shapes
from enginewright.targets.onnx_export import export_onnx

SMALL = {network: fit.small(network) for network in ("encoder", "denoiser", "autoregressive")}
RELEASE = {  # mean, deviation, and four values of each output
    "encoder": (
        (0.35979, 0.67516, 1.59138, 0.56724, 0.48334, 0.71912),
        (-0.18046, 0.68502, -2.08119, 0.3373, -0.61369, -0.98871),
    ),
    "denoiser": (
        (0.21729, 0.81868, 1.57104, -0.83166, 0.11022, 0.96811),
        (0.55601, 3.16958, 6.30288, 2.16785, 2.88183, 0.59414),
    ),
    "autoregressive": ((0.02934, 0.80056, -0.28273, 0.83594, -0.24908, -0.25955),),
}


def meta(config: fit.Config) -> nn.Module:
    with torch.device("meta"):
        return fit.build(config)


def loud(config: fit.Config) -> Any:
    """A network whose weights are so large that every mechanism speaks up."""
    torch.manual_seed(1)
    network = fit.build(config).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.normal_(std=1.5 * weight.shape[1] ** -0.5 if weight.dim() == 2 else 0.7)
    return network


def wave(*shape: int, index: int) -> Tensor:
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.7 * count + 0.01 * count**2 + index).view(shape).float()


def numbered(config: fit.Config) -> Any:
    """A network whose weights follow from their number alone, on any machine."""
    network = fit.build(config).eval().requires_grad_(False)
    for index, weight in enumerate(network.parameters()):
        weight.copy_((1.5 * weight.shape[1] ** -0.5 if weight.dim() == 2 else 0.7) * wave(*weight.shape, index=index))
    return network


def call(config: fit.Config, batch: int = 2) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {
        "x": wave(batch, 4, 9, 12, index=1),
        "time": torch.linspace(0.03, 0.7, batch),
        "condition": wave(batch, 2, 10, index=2),
        "previous": wave(batch, 4, 3, 48, index=3),
        "ids": ((torch.arange(36 * batch) * 7 + torch.arange(36 * batch) ** 2 // 3) % 32).view(batch, 4, 9),
    }
    return {spec.name: found[spec.name] for spec in fit.inputs(config)}


def layer_count(width: int, ratio: int = 4) -> int:
    """Weights of a block: attention, an MLP, two norms."""
    return (4 + 2 * ratio) * width**2 + (9 + ratio) * width


def cross_count(width: int, source: int, inner: int) -> int:
    """Weights of attention from ``width`` to ``source``, with both norms."""
    return width * inner + 2 * source * inner + inner * width + 3 * inner + width + 2 * width + 2 * source


def trunk_count(config: fit.Config) -> int:
    x, latent, inner = config.width, config.latent_width, min(config.width, config.latent_width)
    found = 0
    for index, (local, global_) in enumerate(config.stages):
        found += local * layer_count(x) + global_ * layer_count(latent)
        found += cross_count(latent, x, inner) * (global_ > 0)
        found += cross_count(latent, latent, latent) * (global_ > 0 and config.network == "denoiser")
        found += cross_count(x, latent, inner) * (index < len(config.stages) - 1)
    return found + config.tokens * x + config.groups * config.latents * latent + 2 * x


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("encoder-S", 56_252_160),
        ("denoiser-S", 62_370_608),
        ("ar-S", 56_608_640),
        ("encoder-6400px", 59_901_696),
        ("encoder-tiny", 146_096),
        ("ar-tiny", 146_576),
    ],
)
def test_parameters_are_those_of_the_formula(size: str, count: int) -> None:
    config = fit.PUBLISHED[size]
    x, latent = config.width, config.latent_width
    wanted = trunk_count(config)
    if config.network == "encoder":
        wanted += config.channels * x + 3 * x + 2 * latent
    elif config.network == "denoiser":
        time = latent // 4 * latent + latent + latent**2 + latent
        previous = 8 * latent**2 + 5 * latent + 4 * latent
        wanted += 2 * config.channels * x + config.channels + 3 * x + config.condition_width * latent + latent
        wanted += time + previous
    else:
        wanted += config.vocabulary * (x + 1)
    assert sum(p.numel() for p in meta(config).parameters()) == wanted == count


def test_attention_costs_the_square_of_a_group_and_of_all_latents() -> None:
    config = fit.PUBLISHED["encoder-6400px"]
    g, n, m, x, latent, inner = 400, 400, 16, 384, 512, 384
    linear = g * n * 768 * x + 8 * g * n * 12 * x**2 + 12 * g * m * 12 * latent**2
    across = 6 * (2 * g * n * m * inner + 2 * (g * m * latent * inner + g * n * x * inner))  # three reads, three writes
    wanted = linear + across + 8 * 2 * g * n**2 * x + 12 * 2 * (g * m) ** 2 * latent
    found = macs_of_shapes(meta(config), {"x": torch.zeros(1, g, n, 768, device="meta")})
    assert found == wanted == 3_760_245_964_800
    assert 12 * 2 * (g * m) ** 2 * latent + 8 * 2 * g * n**2 * x < 8 * 2 * (g * n) ** 2 * x / 150  # all tokens to all


@pytest.mark.parametrize("network", SMALL)
def test_the_same_weights_give_the_outputs_of_the_release(network: str) -> None:
    """Recorded from google-research/pix2seq at eabd4e9, run in TensorFlow 2.21 at the tiny sizes."""
    outputs = numbered(SMALL[network])(**call(SMALL[network]))
    for output, wanted in zip(outputs, RELEASE[network], strict=False):
        values = [output[0, 0, 1, 2], output[0, 3, 2, 7], output[1, 1, 0, 5], output[1, 2, 2, 9]]
        found = torch.stack([output.mean(), output.std(), *values])
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-5)


def test_one_group_that_hears_no_latents_is_a_plain_encoder() -> None:
    network = loud(dataclasses.replace(SMALL["encoder"], groups=1))
    blocks, wanted = [], call(SMALL["encoder"])["x"][:, :1]
    for stage in network.trunk.stages:
        blocks += stage.local_blocks
        if stage.write is not None:
            nn.init.zeros_(stage.write.attn.proj.weight)
            nn.init.zeros_(stage.write.attn.proj.bias)
    found = network(wanted)[0]
    wanted = (network.stem_norm(network.stem(wanted)) + network.place).flatten(0, 1)
    for block in blocks:
        plain = nn.TransformerEncoderLayer(32, 2, 128, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
        pairs = zip(plain.parameters(), block_weights(block), strict=True)
        for theirs, ours in pairs:
            theirs.data.copy_(ours)
        wanted = plain(wanted)
    torch.testing.assert_close(found[:, 0], network.norm(wanted), rtol=1e-4, atol=1e-4)


def block_weights(block: Any) -> list[Tensor]:
    """Weights in the order of ``nn.TransformerEncoderLayer``."""
    parts = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, block.norm1, block.norm2)
    return [weight for part in parts for weight in (part.weight, part.bias)]


def test_groups_in_another_order_with_their_latents_come_out_in_that_order() -> None:
    network, x = loud(SMALL["encoder"]), call(SMALL["encoder"])["x"]
    order = torch.tensor([2, 0, 3, 1])
    tokens, latents = network(x)
    assert (network(x[:, order])[0] - tokens[:, order]).abs().max() > 0.1  # latents know where they are
    network.latents.copy_(network.latents[order])
    for found, wanted in zip(network(x[:, order]), (tokens, latents), strict=True):
        torch.testing.assert_close(found, wanted[:, order], rtol=1e-4, atol=1e-4)


def groups_that_move(network: nn.Module, x: Tensor, *, group: int) -> tuple[list[bool], list[bool]]:
    """Which groups' tokens, and which groups' latents, change with one group's tokens."""
    changed = x.clone()
    changed[:, group] += 1
    outputs = zip(network(changed), network(x), strict=True)
    tokens, latents = (((new - old).abs().amax((0, 2, 3)) > 1e-2).tolist() for new, old in outputs)
    return tokens, latents


def test_groups_hear_of_one_another_through_global_layers_alone() -> None:
    network, x = loud(SMALL["encoder"]), call(SMALL["encoder"])["x"]
    assert groups_that_move(network, x, group=1) == ([True] * 4, [True] * 4)
    for stage in network.trunk.stages:
        stage.global_blocks = nn.ModuleList()
    only = [False, True, False, False]
    assert groups_that_move(network, x, group=1) == (only, only)
    local = loud(dataclasses.replace(SMALL["encoder"], stages=((2, 0),)))
    assert groups_that_move(local, x, group=1) == (only, [False] * 4)


def test_tokens_hear_the_latents_of_their_group() -> None:
    network, x = loud(SMALL["encoder"]), call(SMALL["encoder"])["x"]
    before = network(x)[0]
    for stage in network.trunk.stages[:2]:
        stage.write.attn.proj.weight.zero_()
    assert (network(x)[0] - before).abs().max() > 0.1


def test_only_the_last_stage_may_be_without_global_layers() -> None:
    with pytest.raises(AssertionError, match="only the last stage"):
        fit.build(dataclasses.replace(SMALL["encoder"], stages=((1, 0), (1, 1))))


def test_a_token_does_not_depend_on_later_ones_and_does_on_earlier_ones() -> None:
    network, ids = loud(SMALL["autoregressive"]), call(SMALL["autoregressive"])["ids"]
    before, latents = network(ids)
    for group, place in ((0, 0), (1, 4), (2, 8), (3, 0)):
        changed = ids.clone()
        changed[:, group, place] = (changed[:, group, place] + 5) % 32
        after, told = network(changed)
        moved = ((after - before).abs().amax((0, 3)) > 1e-3).flatten()
        if group > 0:
            assert (told - latents)[:, :group].abs().max() < 1e-5
        own, later = 9 * group + place, 9 * (group + 1)
        assert not moved[:own].any()
        assert moved[own:].all()
        assert (told - latents)[:, group:].abs().amin((0, 2)).min() >= 0
        assert moved[later:].all()


def test_the_first_group_hears_zeros_and_the_next_its_latents() -> None:
    stage = fit.Stage(SMALL["autoregressive"], 0)
    latents = torch.randn(8, 3, 48)
    heard = stage.heard(latents).view(2, 4, 3, 48)
    assert not heard[:, 0].any()
    assert torch.equal(heard[:, 1:], latents.view(2, 4, 3, 48)[:, :-1])


def test_latents_see_their_own_group_and_those_before_it() -> None:
    network: Any = fit.build(SMALL["autoregressive"])
    mask = network.trunk.latent_mask.view(4, 3, 4, 3)
    assert torch.equal(mask[:, 0, :, 2], torch.ones(4, 4, dtype=torch.bool).tril())
    assert torch.equal(mask[:, 0], mask[:, 2])
    assert torch.equal(mask[..., 0], mask[..., 2])
    assert not set(network.state_dict()) & {"trunk.mask", "trunk.latent_mask"}


def test_a_denoiser_at_its_start_does_not_hear_the_step_before_and_later_does() -> None:
    torch.manual_seed(0)
    network, inputs = fit.Denoiser(SMALL["denoiser"]).eval().requires_grad_(False), call(SMALL["denoiser"])
    other = {**inputs, "previous": torch.randn(2, 4, 3, 48)}
    assert torch.equal(network(**inputs)[0], network(**other)[0])
    nn.init.ones_(network.previous_norm2.weight)
    assert (network(**inputs)[1] - network(**other)[1]).abs().max() > 0.1
    assert (network(**inputs)[0] - network(**other)[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["x", "time", "condition", "previous"])
def test_each_input_of_the_denoiser_reaches_both_outputs(name: str) -> None:
    network, inputs = loud(SMALL["denoiser"]), call(SMALL["denoiser"])
    other = {**inputs, name: inputs[name].flip(-1)}
    for one, two in zip(network(**inputs), network(**other), strict=True):
        assert (one - two).abs().max() > 0.05


def test_time_is_coded_by_sines_then_cosines_of_zero_mean_and_unit_deviation() -> None:
    time, seen = fit.TimeEmbedding(48), []
    time.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    time(torch.tensor([0.0, 0.0123, 1.0]))
    angle = 12.3 * 10000 ** (-torch.arange(6) / 6)
    wanted = torch.cat([angle.sin(), angle.cos()])
    torch.testing.assert_close(seen[0][1], (wanted - wanted.mean()) / wanted.std(correction=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0][0], torch.tensor([-1.0] * 6 + [1.0] * 6))


def test_the_code_of_time_is_computed_in_float32_beside_half_precise_weights() -> None:
    torch.manual_seed(0)
    time = fit.TimeEmbedding(48).requires_grad_(False)
    moments = torch.tensor([0.1, 0.5004, 0.9001])
    wanted = time(moments)
    assert wanted.std() > 0.1
    time.mlp.bfloat16()
    torch.testing.assert_close(time(moments).float(), wanted, rtol=0, atol=0.02)


def test_an_mlp_may_follow_attention_across() -> None:
    config = dataclasses.replace(SMALL["denoiser"], cross_mlp=True)
    network, inputs = loud(config), call(config)
    extra = 2 * (8 * 48**2 + 7 * 48) + 2 * (8 * 32**2 + 7 * 32)
    assert sum(p.numel() for p in network.parameters()) == 187_964 + extra == 242_332  # that of the release
    before = network(**inputs)[0]
    for stage in network.trunk.stages[:2]:
        assert stage.read_condition.mlp is None
        stage.read.mlp.fc2.weight.zero_()
        stage.write.mlp.fc2.weight.zero_()
    assert (network(**inputs)[0] - before).abs().max() > 0.1


def test_a_picture_is_cut_into_square_groups_of_patches_and_joined_again() -> None:
    image = torch.arange(2 * 3 * 24 * 24).view(2, 3, 24, 24)
    tokens = fit.cut(image, groups=4, patch=4)
    assert tokens.shape == (2, 4, 9, 48)
    assert torch.equal(tokens[1, 2, 5].view(4, 4, 3), image[1, :, 12 + 4 : 12 + 8, 8:12].permute(1, 2, 0))
    assert torch.equal(fit.join(tokens, patch=4), image)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(dataclasses.replace(SMALL["denoiser"], stages=((1, 1), (1, 0))), id="two stages"),
        *(pytest.param(config, id=network, marks=pytest.mark.slow) for network, config in SMALL.items()),
    ],
)
def test_the_exported_network_takes_any_batch(config: fit.Config, tmp_path: Path) -> None:
    import onnxruntime

    path = tmp_path / "model.onnx"
    module, names = loud(config), [spec.name for spec in fit.inputs(config)]
    export_onnx(
        module,
        call(config),
        dynamic={name: {0: ("batch", 1, 16)} for name in names},
        outputs=fit.OUTPUTS,
        path=path,
        embed=True,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5, 16):
        inputs = call(config, batch)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for one, wanted in zip(found, module(**inputs), strict=True):
            assert wanted.std() > 0.3
            torch.testing.assert_close(torch.from_numpy(one), wanted, rtol=1e-4, atol=1e-4)
