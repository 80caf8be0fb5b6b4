from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from enginewright.models.adapters import splitflux
from enginewright.models.adapters.splitflux import TINY, GatedLowRank, Part, SplitFlux
from enginewright.models.blocks.low_rank import LowRank, Product, products
from enginewright.passes.contract import Context
from enginewright.passes.kernel.surgery import share
from enginewright.passes.specialize.adapter_files import read_adapters
from enginewright.passes.specialize.adapters_as_inputs import AdaptersAsInputs
from enginewright.passes.specialize.fold_adapters import FoldAdapters
from enginewright.passes.specialize.fold_own_adapters import FoldOwnAdapters
from enginewright.sources.denoisers import FlatFlux
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import draw

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
"""What rounding may cost; outputs have a standard deviation of about 1."""


def strong(config: splitflux.Config = TINY) -> nn.Module:
    """A small model whose adapters add as much as the layers beside them give."""
    torch.manual_seed(0)
    model = splitflux.build(config).eval()
    with torch.no_grad():
        for product in products(model):
            product.up.weight.mul_(5)
    return model


def example() -> dict[str, Tensor]:
    """A call of two rows."""
    return {name: torch.from_numpy(array) for name, array in draw(splitflux.inputs(TINY), seed=1).items()}


def call(model: nn.Module, **changed: Tensor) -> Tensor:
    """The model's answer to one call of two rows."""
    with torch.no_grad():
        return model(**example() | changed)


def force_gate(model: nn.Module, value: float) -> nn.Module:
    """Put every gate of a model to one value, for text too."""
    for layer in gated(model):
        layer.gate = lambda x: torch.full_like(x[..., :1], value)  # type: ignore[method-assign]
    return model


def gated(model: nn.Module) -> list[GatedLowRank]:
    return [module for module in model.modules() if isinstance(module, GatedLowRank)]


def silence(model: nn.Module, *, where: Callable[[str], bool]) -> nn.Module:
    """Empty the products at some paths, without any merging."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, Product) and where(path):
                module.up.weight.zero_()
    return model


def plain_flux(model: Any, state: dict[str, Tensor]) -> nn.Module:
    """A Flux as diffusers builds it, of a model's sizes, with these tensors and no others."""
    sizes = {name: value for name, value in model.inner.config.items() if not name.startswith("_")}
    flux = SplitFlux(FluxTransformer2DModel(**sizes), TINY).eval()
    flux.load_state_dict(state, strict=True)
    return flux


def base_of(model: nn.Module) -> nn.Module:
    """The plain Flux that a model adapts."""
    tensors = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    return plain_flux(
        model, {name: tensor for name, tensor in tensors.items() if "down" not in name and "up" not in name}
    )


PARTS: dict[str, tuple[Part, ...] | None] = {"content": ("content",), "style": ("style",), "both": None}


def fuse(model: nn.Module, use: str = "both", *, gated: bool = False) -> nn.Module:
    """A copy with the wanted adapters in the weights, as the pass gives it; the content's branch stands for a mix."""
    step = FoldOwnAdapters(keep=PARTS[use], branch="" if gated else "content")
    return step.apply(share(model), Context()).model


def block_of(path: str) -> int:
    return int(path.split("single_transformer_blocks.")[1].split(".")[0])


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_dev_size_has_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        model = splitflux.build(splitflux.PUBLISHED["dev"])
    adapters = sum(map(count, products(model)))
    assert adapters == 43_646_976
    assert count(model) - adapters == 11_901_408_320
    blocks: Any = model.inner.single_transformer_blocks
    ranks = [sum(product.down.out_features for product in products(block)) for block in blocks]
    assert ranks == 10 * [3 * 64] + 2 * [3 * 32] + 26 * [3 * 64]
    assert sum(1 for _ in products(model.inner.transformer_blocks)) == 0


def test_a_plain_adapter_of_rank_64_on_all_single_blocks_has_the_published_number() -> None:
    plain = replace(
        splitflux.PUBLISHED["dev"], double=0, content=range(0), boundary=range(0), style=range(38), residual_rank=0
    )
    with torch.device("meta"):
        assert sum(map(count, products(splitflux.build(plain)))) == 44_826_624


def test_adapters_whose_second_factor_is_zero_leave_flux_as_it_is() -> None:
    base = call(base_of(strong()))
    assert torch.equal(call(silence(strong(), where=lambda path: True)), base)
    assert distance(call(strong()), base) > 0.05


def test_attaching_changes_no_output_until_something_is_learned() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 8), torch.randn(2, 7, 8)
    assert torch.equal(LowRank(linear, Product(linear, 2), 2.0)(x), linear(x))
    assert torch.equal(GatedLowRank(linear, 3, 1, text=2)(x), linear(x))


@pytest.mark.parametrize("branch", ["content", "residual"])
def test_a_gate_held_at_one_end_is_the_merged_weight_of_that_branch(branch: str) -> None:
    model = force_gate(strong(), float(branch == "content"))
    layer: Any = gated(model)[0]
    product = getattr(layer, branch)
    x = torch.randn(2, 22, 32)
    merged = layer.base.weight + product.up.weight @ product.down.weight
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ merged.T + layer.base.bias, **TOLERANCE)
        torch.testing.assert_close(layer(x), layer.merged(branch)(x), **TOLERANCE)
        torch.testing.assert_close(layer(x), layer.held_at(branch)(x), **TOLERANCE)
        assert distance(layer(x), layer.base(x)) > 0.1


def test_fused_style_is_what_the_style_adapters_alone_compute() -> None:
    model = strong()
    fused = call(fuse(model, "style"))
    alone = silence(strong(), where=lambda path: block_of(path) not in TINY.style)
    torch.testing.assert_close(fused, call(alone), **TOLERANCE)
    assert distance(fused, call(fuse(model, "content"))) > 0.05


def test_fused_content_is_what_the_high_rank_branch_and_the_boundary_compute() -> None:
    model = strong()
    fused = call(fuse(model, "content"))
    alone = force_gate(silence(strong(), where=lambda path: block_of(path) in TINY.style), 1.0)
    torch.testing.assert_close(fused, call(alone), **TOLERANCE)
    assert distance(fused, call(silence(alone, where=lambda path: block_of(path) in TINY.boundary))) > 0.01
    with_style = call(force_gate(strong(), 1.0))
    torch.testing.assert_close(call(fuse(model, "both")), with_style, **TOLERANCE)
    assert distance(fused, with_style) > 0.01


def test_all_but_the_gated_blocks_merge_without_changing_the_answer() -> None:
    model = strong()
    fused = fuse(model, "both", gated=True)
    torch.testing.assert_close(call(fused), call(model), **TOLERANCE)
    assert not any(isinstance(module, LowRank) for module in fused.modules())
    assert len(gated(fused)) == 3 * len(TINY.content)
    content = fuse(model, "content", gated=True)
    alone = silence(strong(), where=lambda path: block_of(path) in TINY.style)
    torch.testing.assert_close(call(content), call(alone), **TOLERANCE)


@pytest.mark.parametrize("use", PARTS)
def test_what_is_fused_is_a_plain_flux_and_the_model_stays(use: str) -> None:
    model = strong()
    before = call(model)
    fused = fuse(model, use)
    assert torch.equal(call(plain_flux(fused, fused.state_dict())), call(fused))
    assert torch.equal(call(model), before)
    assert distance(call(fused), call(base_of(model))) > 0.01


def test_the_pass_that_folds_adapters_agrees_on_style_and_boundary(tmp_path: Path) -> None:
    """It merges by peft's own layers, and divides alpha by the rank, which the paper does not."""
    model: Any = silence(strong(), where=lambda path: block_of(path) in TINY.content)
    tensors = {
        f"transformer.{key}": tensor
        for key, tensor in splitflux.adapter_tensors(model, ("content", "style")).items()
        if block_of(key) not in TINY.content
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    folded = base_of(model)
    before = call(folded)
    FoldAdapters(file="adapter.safetensors").apply(folded, Context(folder=tmp_path))
    torch.testing.assert_close(call(folded), call(model), **TOLERANCE)
    assert distance(call(folded), before) > 0.05


def test_an_engine_for_flux_takes_the_adapters_as_inputs(tmp_path: Path) -> None:
    model = strong()
    patterns = [f"*single_transformer_blocks.*.{name}" for name in splitflux.TARGETS]
    step = AdaptersAsInputs(layers=tuple(patterns), rank=TINY.rank)
    base = fuse_nothing(model)
    plain = call(base)
    result = step.apply(base, Context(example=example()))
    assert len(result.changed) == 3 * TINY.single
    for use, parts in (("style", ("style",)), ("both", ("content", "style"))):
        save_file(splitflux.adapter_tensors(model, parts), tmp_path / "adapter.safetensors")
        given = step.arrays_of(read_adapters("adapter.safetensors", tmp_path, of=None, alpha=None), result.plan)
        found = call(result.model, **given)
        torch.testing.assert_close(found, call(fuse(model, use)), **TOLERANCE)
        assert distance(found, plain) > 0.02
    assert torch.equal(call(result.model), plain)


def fuse_nothing(model: nn.Module) -> nn.Module:
    """The plain Flux, by the pass."""
    result = FoldOwnAdapters(keep=()).apply(share(model), Context())
    assert torch.equal(call(result.model), call(base_of(model)))
    return result.model


def test_the_pass_tells_what_is_fusable_and_what_the_rest_costs() -> None:
    model = strong()
    result = FoldOwnAdapters().apply(share(model), Context(example=example()))
    assert result.plan.facts.fusable is False
    rows, ranks, width = 2 * (TINY.text + TINY.side**2), TINY.rank, TINY.heads * TINY.head_dim
    added = rows * 3 * len(TINY.content) * ranks * 2 * width
    fused, stays = result.plan.facts.notes
    assert fused == "fusable: the adapters of 6 layers went into weights, at the base's cost"
    assert stays.startswith(
        "the adapters of 6 layers stay beside them, not fusable: a gate mixes its two branches anew for each token; "
        f"they add {added:,} multiply-accumulates to a call ("
    )
    whole = FoldOwnAdapters(branch="residual").apply(share(model), Context(example=example()))
    assert whole.plan.facts.fusable is True
    assert whole.before.macs is not None
    assert whole.after.macs is not None
    assert result.after.macs == whole.after.macs + added
    torch.testing.assert_close(call(whole.model), call(force_gate(model, 0.0)), **TOLERANCE)


def test_rotary_tables_are_those_of_diffusers_pipeline() -> None:
    from diffusers import FluxPipeline

    model: Any = strong()
    base = base_of(model)
    flat = FlatFlux(FluxTransformer2DModel(**{k: v for k, v in model.inner.config.items() if k[0] != "_"})).eval()
    flat.load_state_dict(base.state_dict(), strict=True)
    ids = FluxPipeline._prepare_latent_image_ids(1, TINY.side, TINY.side, "cpu", torch.float32)
    wanted = call(flat, img_ids=ids, txt_ids=torch.zeros(TINY.text, 3))
    torch.testing.assert_close(call(base), wanted, **TOLERANCE)
    moved = call(flat, img_ids=ids.flip(0), txt_ids=torch.zeros(TINY.text, 3))
    assert distance(moved, wanted) > 1e-3


def test_the_gate_of_an_image_token_follows_its_length_and_no_text() -> None:
    layer = GatedLowRank(nn.Linear(4, 4), 2, 1, text=2)
    direction = torch.nn.functional.normalize(torch.randn(5, 4), dim=-1)
    x = (direction * torch.tensor([7.0, 0.1, 1.0, 2.0, 3.0])[:, None])[None]
    wanted = torch.tensor([1, 1, 0.268941, 0.5, 0.731059])  # sigmoid of -1, 0 and 1
    torch.testing.assert_close(layer.gate(x)[0, :, 0], wanted, rtol=0, atol=1e-5)
    other_text = torch.cat([torch.randn(1, 2, 4), x[:, 2:]], dim=1)
    assert torch.equal(layer.gate(other_text), layer.gate(x))
    other_row = torch.cat([x, torch.randn(1, 5, 4)])
    torch.testing.assert_close(layer.gate(other_row)[:1], layer.gate(x))
    assert not torch.equal(layer.gate(torch.cat([x[:, :4], 2 * x[:, 4:]], dim=1)), layer.gate(x))


def test_the_gate_is_reckoned_in_float32() -> None:
    """Lengths around 30 that differ by a hundredth: half precision has steps of a sixty-fourth there."""
    torch.manual_seed(0)
    layer = GatedLowRank(nn.Linear(64, 64), 2, 1, text=1)
    x = torch.nn.functional.normalize(torch.randn(1, 40, 64), dim=-1)
    x = (30 * x * (1 + 0.01 * torch.randn(1, 40, 1))).half()
    found = layer.gate(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), layer.gate(x.float()), rtol=0, atol=5e-4)


def test_tokens_of_one_length_share_a_gate_of_a_half() -> None:
    layer = GatedLowRank(nn.Linear(4, 4), 2, 1, text=1)
    assert layer.gate(torch.ones(1, 4, 4))[0, :, 0].tolist() == [1, 0.5, 0.5, 0.5]


def test_a_single_block_reads_text_first() -> None:
    """What the gate's slice rests on; without double blocks, text reaches the first single block's first rows alone."""
    model = strong(replace(TINY, double=0))
    seen: list[Tensor] = []
    gated(model)[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    call(model)
    call(model, encoder_hidden_states=torch.randn(2, TINY.text, TINY.text_width))
    changed = (seen[0] != seen[1]).any(dim=-1)  # (B, N)
    assert changed[:, : TINY.text].all()
    assert not changed[:, TINY.text :].any()


def test_the_gate_the_alpha_and_the_residual_branch_each_show_in_the_output() -> None:
    whole = call(strong())
    assert distance(whole, call(force_gate(strong(), 0.5))) > 0.01
    assert distance(whole, call(silence(strong(), where=lambda path: path.endswith("residual")))) > 0.01
    without = strong()
    for module in without.modules():
        if isinstance(module, LowRank):
            module.alpha = 1.0
    assert distance(whole, call(without)) > 0.01


def test_the_complementary_loss_is_the_sum_of_three_overlaps() -> None:
    linear = nn.Linear(2, 2)
    one, two = Product(linear, 1), Product(linear, 1)
    with torch.no_grad():
        for weight, values in (
            (one.down.weight, [[1.0, 2.0]]),
            (two.down.weight, [[3.0, -1.0]]),
            (one.up.weight, [[1.0], [0.0]]),
            (two.up.weight, [[2.0], [5.0]]),
        ):
            weight.copy_(torch.tensor(values))
    # A C' = 1; B' D = 2; B A = [[1, 2], [0, 0]], D C = [[6, -2], [15, -5]], their entries' product [[6, -4], [0, 0]].
    assert splitflux.complementary_loss(one, two).item() == 1 + 4 + 10
    with torch.no_grad():
        two.down.weight.copy_(torch.tensor([[2.0, -1.0]]))
        two.up.weight.copy_(torch.tensor([[0.0], [5.0]]))
    assert splitflux.complementary_loss(one, two).item() == 0
    splitflux.complementary_loss(one, two).backward()
    assert all(weight.grad is not None for weight in (one.up.weight, one.down.weight, two.up.weight, two.down.weight))


def test_a_fused_model_exports_to_the_nodes_of_plain_flux(tmp_path: Path) -> None:
    model = strong(replace(TINY, double=0, single=1, content=range(1), boundary=range(0), style=range(0)))
    nodes = []
    for network in (fuse(model), base_of(model)):
        path = tmp_path / f"{len(nodes)}.onnx"
        export_onnx(network, example(), dynamic={}, outputs=splitflux.OUTPUTS, path=path)
        nodes.append(Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node))
        graph = onnx.load(path, load_external_data=False).graph
        casts = {each.i for node in graph.node for each in node.attribute if each.name == "to"}
        assert onnx.TensorProto.DOUBLE not in casts | {each.data_type for each in graph.initializer}
        places = {entry.value for node in graph.node for entry in node.metadata_props if entry.key == "module"}
        assert any("single_transformer_blocks.0" in place for place in places)
        assert not any("pos_embed" in place for place in places), "tables are constants"
    assert nodes[0] == nodes[1]
    assert nodes[0]["MatMul"] >= 7  # five linear layers of the single block and two products of its attention
