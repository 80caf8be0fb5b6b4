from __future__ import annotations

import pytest
import torch

from enginewright.models.diffusion import dit
from enginewright.show import describe


@pytest.mark.parametrize(
    ("size", "count", "giga"), [("S/2", 33, 6.06), ("B/2", 130, 23.01), ("L/2", 458, 80.71), ("XL/2", 675, 118.64)]
)
def test_parameters_and_macs_are_the_papers(size: str, count: int, giga: float) -> None:
    found = describe(f"dit:{size}")
    assert found["parameter_count"] // 1_000_000 in (count, count - 1)
    # The paper counts a little more than the products: norms and the like.
    assert found["macs"] / 1e9 == pytest.approx(giga, rel=0.002)


def test_xl_2_has_exactly_the_released_number_of_parameters() -> None:
    assert describe("dit:XL/2")["parameter_count"] == 675_129_632


def test_every_block_is_the_identity_at_the_start() -> None:
    """AdaLN-zero: gates at zero, and an output layer at zero."""
    torch.manual_seed(0)
    net = dit.build(dit.TINY)
    x = torch.randn(2, 16, 32)
    assert torch.equal(net.blocks[0](x, torch.randn(2, 32)), x)
    assert not net(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])).any()


def test_positions_code_the_column_first_as_the_release_does() -> None:
    table = dit.position_table(32, 4).view(4, 4, 32)
    assert torch.equal(table[0, 1, :16], table[3, 1, :16])
    assert torch.equal(table[1, 0, 16:], table[1, 3, 16:])
    assert not torch.equal(table[0, 1, :16], table[0, 2, :16])
    assert table[2, 1, 0].item() == pytest.approx(0.8415, abs=1e-4)  # sin(1), column 1


def test_the_same_weights_give_the_outputs_of_diffusers() -> None:
    """Diffusers holds the same network; its blocks each carry a copy of the two embedders.

    Its timestep frequencies end at 1/10000; the paper's own code, and ours, stop one step short of that.
    """
    from diffusers import DiTTransformer2DModel

    config = dit.Config(depth=2, width=32, heads=4, side=8, classes=1000)
    torch.manual_seed(0)
    ours = dit.build(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), depth=2), strict=True)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 999, 1000])
    with torch.no_grad():
        wanted = theirs(x, timestep=t, class_labels=y).sample
        found = ours(x, t, y)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def to_diffusers(state: dict[str, torch.Tensor], *, depth: int) -> dict[str, torch.Tensor]:
    """Our names as diffusers names them; it makes its position table itself."""
    out = {
        "pos_embed.proj.weight": state["x_embedder.proj.weight"],
        "pos_embed.proj.bias": state["x_embedder.proj.bias"],
    }
    for part in ("weight", "bias"):
        out[f"proj_out_1.{part}"] = state[f"final_layer.adaLN_modulation.1.{part}"]
        out[f"proj_out_2.{part}"] = state[f"final_layer.linear.{part}"]
    for i in range(depth):
        ours, block = f"blocks.{i}", f"transformer_blocks.{i}"
        for part in ("weight", "bias"):
            for n, side in ((0, "linear_1"), (2, "linear_2")):
                out[f"{block}.norm1.emb.timestep_embedder.{side}.{part}"] = state[f"t_embedder.mlp.{n}.{part}"]
            q, k, v = state[f"{ours}.attn.qkv.{part}"].chunk(3)
            out |= {f"{block}.attn1.to_{n}.{part}": w for n, w in (("q", q), ("k", k), ("v", v))}
            out[f"{block}.attn1.to_out.0.{part}"] = state[f"{ours}.attn.proj.{part}"]
            out[f"{block}.norm1.linear.{part}"] = state[f"{ours}.adaLN_modulation.1.{part}"]
            out[f"{block}.ff.net.0.proj.{part}"] = state[f"{ours}.mlp.fc1.{part}"]
            out[f"{block}.ff.net.2.{part}"] = state[f"{ours}.mlp.fc2.{part}"]
        out[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
    return out
