from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from enginewright.models.diffusion import li_dit
from enginewright.passes.contract import Context, macs, macs_of_shapes
from enginewright.passes.specialize.cut_after import CutAfter
from enginewright.passes.specialize.hoist_constants import HoistConstants
from enginewright.passes.traits import HeadedAttention, trait_of
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import draw

TINY = li_dit.TINY
ALONE = dataclasses.replace(TINY, tokens=(9,), instruction=(3,))


@cache
def meta(size: str) -> tuple[nn.Module, nn.Module]:
    config = li_dit.PUBLISHED[size]
    with torch.device("meta"):
        return li_dit.Refiner(config), li_dit.DiT(config)


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def loud(network: Any) -> Any:
    """The network with weights so large that every mechanism speaks up."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.normal_(std=weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.3)
            if "norm" in name:
                weight.add_(1)
    return network.eval().requires_grad_(False)


def text_call(config: li_dit.Config = TINY, padding: int = 2) -> dict[str, Tensor]:
    """A call of the refiner, each prompt with some padding in the first row."""
    torch.manual_seed(2)
    call = {"t": torch.tensor([40.0, 700.0])}
    for number, tokens in enumerate(config.tokens, start=1):
        call[f"hidden_{number}"] = torch.randn(2, tokens, config.text_width)
        call[f"mask_{number}"] = torch.ones(2, tokens)
        call[f"mask_{number}"][0, tokens - padding :] = 0
    return call


def dit_call(height: int = 8, width: int = 12) -> dict[str, Tensor]:
    torch.manual_seed(3)
    mask = torch.ones(2, 11)
    mask[0, 8:] = 0
    return {
        "x": torch.randn(2, TINY.channels, height, width),
        "t": torch.tensor([40.0, 700.0]),
        "text": torch.randn(2, 11, TINY.width),
        "text_mask": mask,
        "pooled": torch.randn(2, 2 * TINY.text_width),
    }


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize(
    ("size", "matrices", "denoiser", "refiner"),
    [("1B", 928_972_800, 968_776_768, 1_566_442_624), ("10B", 9_515_827_200, 9_717_445_440, 1_573_260_032)],
)
def test_parameters_are_those_of_25_squares_of_the_width(size: str, matrices: int, denoiser: int, refiner: int) -> None:
    config, (text, dit) = li_dit.PUBLISHED[size], meta(size)
    blocks: Any = dit.blocks
    assert sum(w.numel() for w in blocks.parameters() if w.dim() == 2) == 25 * config.depth * config.width**2
    assert 25 * config.depth * config.width**2 == matrices
    assert (count(dit), count(text)) == (denoiser, refiner)
    assert config.width // config.heads == {"1B": 72, "10B": 64}[size]


def test_multiply_accumulates_at_256_pixels_are_those_counted_by_hand() -> None:
    config, (_, dit) = li_dit.PUBLISHED["1B"], meta("1B")
    n, m, d = 16 * 16, sum(config.tokens) - sum(config.instruction), config.width
    shapes = {"x": (1, 16, 32, 32), "t": (1,), "text": (1, m, d), "text_mask": (1, m), "pooled": (1, 8192)}
    with torch.device("meta"):
        found = macs_of_shapes(dit, {name: torch.zeros(shape) for name, shape in shapes.items()})
    block = (14 * n + 2 * m + 9) * d * d + 2 * n * (n + m) * d  # all but keys and values of text, on image tokens
    rest = n * 64 * d + 18 * n * d * d + (256 + d) * d + (8192 + d) * d + 2 * d * d + n * d * 64
    assert found == 28 * block + rest == 190_414_356_480


@torch.no_grad()
def test_with_gates_of_zero_the_refiner_is_the_identity() -> None:
    torch.manual_seed(0)
    refiner, call = li_dit.Refiner(TINY), text_call()
    text, mask, _ = refiner(**call)
    kept = torch.cat([call["hidden_1"][:, 3:], call["hidden_2"][:, 2:]], dim=1)
    assert torch.equal(text, refiner.project(kept))
    assert torch.equal(mask, torch.cat([call["mask_1"][:, 3:], call["mask_2"][:, 2:]], dim=1))
    refiner = loud(refiner)
    assert apart(refiner(**call)[0], refiner.project(kept)) > 1


@torch.no_grad()
def test_a_new_denoiser_gives_zeros_and_its_blocks_what_they_are_given() -> None:
    torch.manual_seed(0)
    dit, call = li_dit.DiT(TINY), dit_call()
    x, c, seen = torch.randn(2, 6, 32), torch.randn(2, 32), torch.ones(2, 1, 1, 11, dtype=torch.bool)
    assert torch.equal(dit.blocks[0](x, c, call["text"], seen), x)
    assert not dit(**call).any()


@torch.no_grad()
def test_permuted_captions_give_permuted_text() -> None:
    """Nothing in the refiner knows where a token stands; causal attention would."""
    refiner, call = loud(li_dit.Refiner(TINY)), text_call()
    text, mask, pooled = refiner(**call)
    order = torch.tensor([0, 1, 2, 7, 4, 8, 3, 6, 5])  # the first three are the instruction
    permuted = {**call, "hidden_1": call["hidden_1"][:, order], "mask_1": call["mask_1"][:, order]}
    again, mask_again, pooled_again = refiner(**permuted)
    rows = torch.cat([order[3:] - 3, torch.arange(6, 11)])
    torch.testing.assert_close(again, text[:, rows], rtol=1e-4, atol=1e-4)
    assert torch.equal(mask_again, mask[:, rows])
    torch.testing.assert_close(pooled_again, pooled)
    assert apart(again, text) > 0.5


@torch.no_grad()
def test_alone_a_language_models_collaboration_is_an_mlp() -> None:
    block = loud(li_dit.Collaboration(24, 3, 4, is_alone=True))
    x, c = torch.randn(2, 9, 24), torch.randn(2, 24)
    assert block.cross is None
    shift, scale, gate = block.modulation(c)[:, None].chunk(3, dim=2)
    assert torch.equal(block(x, c, None, None), x + gate * block.mlp(block.norm2(x) * (1 + scale) + shift))
    both = loud(li_dit.Collaboration(24, 3, 4, is_alone=False))
    other, seen = torch.randn(2, 7, 24), torch.ones(2, 1, 1, 7, dtype=torch.bool)
    whole = both(x, c, other, seen)
    assert apart(whole, both(x, c, other.flip(0), seen)) > 0.1
    both.modulation.weight[48:72] = 0  # the gate of its attention
    both.modulation.bias[48:72] = 0
    shift, scale, gate = both.modulation(c)[:, None, 72:].chunk(3, dim=2)
    assert torch.equal(both(x, c, other, seen), x + gate * both.mlp(both.norm2(x) * (1 + scale) + shift))


@torch.no_grad()
def test_one_language_model_is_refined_and_read_alone() -> None:
    torch.manual_seed(0)
    model = loud(li_dit.build(ALONE))
    assert [spec.name for spec in li_dit.inputs(ALONE)] == ["x", "t", "hidden_1", "mask_1"]
    call = {**text_call(ALONE), "x": dit_call()["x"]}
    noise = model(**call)
    assert noise.shape == call["x"].shape
    assert apart(noise, model(**{**call, "hidden_1": call["hidden_1"].flip(0)})) > 0.1


@torch.no_grad()
def test_the_instruction_is_cut_but_was_read_and_padding_is_not_read_at_all() -> None:
    refiner, dit, call = loud(li_dit.Refiner(TINY)), loud(li_dit.DiT(TINY)), text_call()
    text, mask, pooled = refiner(**call)
    assert text.shape == (2, 6 + 5, TINY.width)
    padded = {**call, "hidden_1": call["hidden_1"].clone(), "hidden_2": call["hidden_2"].clone()}
    padded["hidden_1"][0, -2:] += 9
    padded["hidden_2"][0, -2:] += 9
    found, _, pooled_found = refiner(**padded)
    real = mask.bool()
    assert torch.equal(pooled_found, pooled)
    torch.testing.assert_close(found[real], text[real])
    assert apart(found, text) > 1
    picture = {"x": dit_call()["x"], "t": call["t"], "text_mask": mask, "pooled": pooled}
    torch.testing.assert_close(dit(**picture, text=found), dit(**picture, text=text))
    told = {**call, "hidden_1": call["hidden_1"].clone()}
    told["hidden_1"][:, 0] += 1 + torch.arange(24) % 3  # and less in the next, so that the mean stays
    told["hidden_1"][:, 1] -= 1 + torch.arange(24) % 3
    found, _, pooled_found = refiner(**told)
    torch.testing.assert_close(pooled_found, pooled)
    assert apart(found, text) > 0.1


@torch.no_grad()
def test_each_language_models_tokens_read_the_others() -> None:
    refiner, call = loud(li_dit.Refiner(TINY)), text_call()
    text, _, _ = refiner(**call)
    for number, rows in ((1, slice(6, 11)), (2, slice(0, 6))):
        other = call[f"hidden_{number}"].flip(2)
        assert apart(refiner(**{**call, f"hidden_{number}": other})[0][:, rows], text[:, rows]) > 0.1, number


@torch.no_grad()
def test_timestep_and_mean_features_reach_both_networks() -> None:
    refiner, dit, call, picture = loud(li_dit.Refiner(TINY)), loud(li_dit.DiT(TINY)), text_call(), dit_call()
    text, _, pooled = refiner(**call)
    later, _, pooled_later = refiner(**{**call, "t": call["t"] + 100})
    assert apart(later, text) > 0.1
    assert torch.equal(pooled_later, pooled)
    means = [(call[f"hidden_{i}"] * (m := call[f"mask_{i}"])[..., None]).sum(1) / m.sum(1)[:, None] for i in (1, 2)]
    torch.testing.assert_close(pooled, torch.cat(means, dim=1))
    noise = dit(**picture)
    for name in ("t", "pooled", "text"):
        assert apart(dit(**{**picture, name: picture[name] + 1}), noise) > 0.05, name
    block, x, seen = refiner.token_refiners[0][0], torch.randn(1, 4, 24), torch.ones(1, 1, 1, 4, dtype=torch.bool)
    block.gates.weight.zero_()
    assert torch.equal(block(x, torch.randn(1, 24), seen), block(x, torch.randn(1, 24), seen))


@torch.no_grad()
def test_the_length_of_queries_and_keys_does_not_matter_and_that_of_values_does() -> None:
    attention, cross = loud(li_dit.NormedSelfAttention(32, 4)), loud(li_dit.CrossAttention(32, 4, is_normed=True))
    x, text, seen = torch.randn(2, 6, 32), torch.randn(2, 11, 32), torch.ones(2, 1, 1, 11, dtype=torch.bool)
    before, before_cross = attention(x), cross(x, text, seen)
    for layer, rows in ((attention.qkv, slice(0, 64)), (cross.q, slice(None)), (cross.kv, slice(0, 32))):
        layer.weight[rows] *= 7
        layer.bias[rows] *= 7
    torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cross(x, text, seen), before_cross, rtol=1e-4, atol=1e-4)
    attention.qkv.weight[64:] *= 7
    cross.kv.weight[32:] *= 7
    assert apart(attention(x), before) > 1
    assert apart(cross(x, text, seen), before_cross) > 1


@torch.no_grad()
def test_convolutions_alone_know_where_a_patch_lies() -> None:
    dit, call = loud(li_dit.DiT(TINY)), dit_call()

    def flipped(x: Tensor) -> Tensor:
        """The patches of x (B, C, Y, X) in reverse order of rows, each as it was."""
        return x.unflatten(2, (-1, 2)).flip(2).flatten(2, 3)

    other = {**call, "x": flipped(call["x"])}
    assert apart(dit(**other), flipped(dit(**call))) > 0.1
    for weight in dit.positions.conv2.parameters():
        weight.zero_()
    torch.testing.assert_close(dit(**other), flipped(dit(**call)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_patch_of_the_noise_lies_where_its_patch_of_the_latent_lay() -> None:
    torch.manual_seed(0)
    dit, call = li_dit.DiT(TINY), dit_call()  # gates of zero: no token sees another
    nn.init.zeros_(dit.positions.conv2.weight)
    nn.init.normal_(dit.final_layer.linear.weight)
    before = dit(**call)
    call["x"][:, :, 2, 9] += 1
    rows, columns = (before - dit(**call)).abs().amax((0, 1)).gt(1e-4).nonzero().unbind(1)
    assert (set(rows.tolist()), set(columns.tolist())) == ({2, 3}, {8, 9})
    nn.init.zeros_(dit.final_layer.linear.weight)
    dit.final_layer.linear.bias.copy_(torch.arange(16))
    patch = dit(**call)[0, :, 4:6, 6:8]  # (C, P, P): features go row by row, then column, then channel
    assert patch.permute(1, 2, 0).flatten().tolist() == list(range(16))


@pytest.mark.parametrize("blocks", [5, 8])
def test_a_language_model_that_ends_at_its_third_to_last_block_gives_the_same_bits(blocks: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "vocab_size": 50}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=3, num_hidden_layers=blocks)
    model, ids = transformers.LlamaModel(config).eval(), torch.randint(50, (2, 9))
    with torch.no_grad():
        tapped = model(ids, output_hidden_states=True).hidden_states[-3]
        result = CutAfter(layer=-3).apply(model, Context(example={"input_ids": ids}))
        found = result.model(ids).last_hidden_state
    assert len(result.model.layers) == blocks - 2
    assert torch.equal(found, tapped)
    assert result.after.macs * blocks == pytest.approx(result.before.macs * (blocks - 2), rel=0.02)


@torch.no_grad()
def test_a_silent_head_with_normed_queries_goes_and_the_output_stays() -> None:
    attention, x = loud(li_dit.NormedSelfAttention(32, 4)), torch.randn(2, 6, 32)
    attention.proj.weight[:, 8:16] = 0
    before = attention(x)
    layer = trait_of(attention, HeadedAttention)
    assert layer is not None
    layer.keep_heads([0, 2, 3])
    assert attention.qkv.out_features == 3 * 24
    torch.testing.assert_close(attention(x), before)


@torch.no_grad()
def test_what_no_timestep_changes_is_computed_once_for_a_run() -> None:
    """The first attention of each token refiner reads hidden states alone: only its gate depends on the timestep."""
    model = loud(li_dit.build(TINY))
    call = {name: torch.from_numpy(array) for name, array in draw(li_dit.inputs(TINY), seed=0).items()}
    plan = HoistConstants(constant=("hidden_1", "mask_1", "hidden_2", "mask_2")).plan(model, Context(example=call))
    first = {f"networks.refiner.token_refiners.{j}.0.{part}" for j in (0, 1) for part in ("norm1", "attn")}
    assert {path for path in plan.choice if path.startswith("networks.refiner")} == first
    width = TINY.text_width
    once = 2 * sum(4 * tokens * width**2 + 2 * tokens**2 * width for tokens in TINY.tokens)  # two rows
    assert plan.facts.macs_once == once
    assert plan.facts.macs_per_step == macs(model, call) - once


@pytest.mark.parametrize(
    ("sides", "shapes"),
    [
        ({}, ((8, 12),)),
        pytest.param(
            {2: ("height", 8, 16, 2), 3: ("width", 8, 16, 2)},
            ((8, 12), (8, 8), (14, 10), (16, 16)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one size", "any size"],
)
@torch.no_grad()
def test_the_onnx_graph_of_the_denoiser_equals_it(sides: dict[int, Any], shapes: Any, tmp_path: Path) -> None:
    network = loud(li_dit.DiT(dataclasses.replace(TINY, depth=1)))
    call = dit_call()
    dynamic = {name: {0: ("batch", 1, 16), **(sides if name == "x" else {})} for name in call}
    export_onnx(network, call, dynamic=dynamic, outputs=li_dit.OUTPUTS, path=tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for sizes in shapes:
        inputs = dit_call(*sizes)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        wanted = network(**inputs)
        assert wanted.std() > 0.3
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
