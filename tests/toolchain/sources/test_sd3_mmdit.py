"""Stable Diffusion 3's denoiser is what its paper says: two streams, one attention, all modulation from two inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from enginewright import catalog, sources
from enginewright.calibration import tensors
from enginewright.passes.contract import Context, macs
from enginewright.passes.specialize.hoist_constants import HoistConstants
from enginewright.passes.traits import HeadedAttention, layers_of

pytest.importorskip("diffusers")
TOKENS, TEXT, WIDTH, HEADS = 16, 5, 32, 4


@pytest.fixture
def network() -> Any:
    """The one of the recipe that ships."""
    folder = catalog.recipe_path("sd3-mmdit-tiny").parent
    return sources.load(f"py:{folder}/tiny_networks.py:sd3").module.requires_grad_(False)


@pytest.fixture
def call() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([100.0, 700.0]),
    }


def velocity(network: Any, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return network(**call).sample


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def streams() -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens, text tokens and a condition of a block."""
    return torch.randn(2, TOKENS, WIDTH), torch.randn(2, TEXT, WIDTH), torch.randn(2, WIDTH)


def test_image_and_text_share_one_attention_the_image_first(network: Any, call: Any, monkeypatch: Any) -> None:
    attended: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def watched(query: Tensor, *rest: Any, **named: Any) -> Tensor:
        attended.append(query)
        return attend(query, *rest, **named)

    written: dict[str, Tensor] = {}
    attention = network.transformer_blocks[0].attn
    for name in ("to_q", "add_q_proj"):
        getattr(attention, name).register_forward_hook(lambda _, args, out, name=name: written.update({name: out}))
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    velocity(network, call)
    assert [query.shape for query in attended] == 3 * [(2, HEADS, TOKENS + TEXT, WIDTH // HEADS)]
    rows = attended[0].transpose(1, 2).flatten(2)  # (B, N, D)
    assert torch.equal(rows[:, :TOKENS], written["to_q"])
    assert torch.equal(rows[:, TOKENS:], written["add_q_proj"])


def test_the_order_of_text_tokens_does_not_matter_and_that_of_patches_does(network: Any, call: Any) -> None:
    before = velocity(network, call)
    text = call["encoder_hidden_states"]
    swapped = velocity(network, {**call, "encoder_hidden_states": text[:, [3, 1, 4, 0, 2]]})
    torch.testing.assert_close(swapped, before, rtol=1e-4, atol=1e-5)
    assert apart(velocity(network, {**call, "encoder_hidden_states": text.flip(0)}), before) > 1e-2
    turned = velocity(network, {**call, "hidden_states": call["hidden_states"].roll(4, 3)})
    assert apart(turned.roll(-4, 3), before) > 1e-2


def test_a_guided_pair_in_one_call_is_two_calls(network: Any, call: Any) -> None:
    both = velocity(network, call)
    each = [velocity(network, {name: rows[i : i + 1] for name, rows in call.items()}) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-4, atol=1e-5)
    assert apart(each[0], each[1]) > 0.1


def test_the_last_block_reads_text_and_gives_none(network: Any) -> None:
    x, text, c = streams()
    *others, last = network.transformer_blocks
    with torch.no_grad():
        assert last(x, text, c)[0] is None
        assert all(block(x, text, c)[0].shape == text.shape for block in others)
        assert apart(last(x, text, c)[1], last(x, text.flip(0), c)[1]) > 1e-3
    outputs = [len(layer.outputs) for _, layer in layers_of(network, HeadedAttention)]
    assert outputs == [2, 2, 1]
    assert last.ff_context is None


def test_without_gates_a_block_gives_both_streams_as_they_were(network: Any) -> None:
    x, text, c = streams()
    block = network.transformer_blocks[0]
    assert apart(block(x, text, c)[1], x) > 0.1
    for norm in (block.norm1, block.norm1_context):
        for gate in (2, 5):  # of attention and of the feed-forward, after shift and scale of each
            rows = slice(gate * WIDTH, (gate + 1) * WIDTH)
            norm.linear.weight[rows] = 0
            norm.linear.bias[rows] = 0
    found_text, found = block(x, text, c)
    assert torch.equal(found, x)
    assert torch.equal(found_text, text)


def test_all_modulation_is_computed_apart_from_the_tokens() -> None:
    folder = catalog.recipe_path("sd3-mmdit-tiny").parent
    model = sources.load(f"py:{folder}/tiny_networks.py:sd3")
    example = tensors(model.batches(1, 3))[0]
    step = HoistConstants(constant=("timestep", "pooled_projections"))
    plan = step.plan(model.module, Context(example=example))
    norms = {path for path, _ in model.module.named_modules() if "norm" in path and path.endswith(".linear")}
    assert plan.choice.keys() == {"time_text_embed"} | norms | silus(model.module, plan.choice)
    assert len(norms) == 3 * 2 + 1
    vectors = 2 * 12 + (6 + 2) + 2  # of two blocks, the last, and the norm after it
    once = 2 * ((256 + 10 + 2 * WIDTH) * WIDTH + vectors * WIDTH**2)  # two rows
    assert plan.facts.macs_once == once
    assert plan.facts.macs_per_step == macs(model.module, example) - once


def silus(module: Any, paths: Any) -> set[str]:
    """Those of some paths that are activations alone."""
    return {path for path in paths if not any(True for _ in module.get_submodule(path).parameters())}
