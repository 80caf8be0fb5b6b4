from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan, Result
from enginewright.passes.graph.products import Product, look_at_patches, product_of
from enginewright.passes.graph.quantize_graph_int8 import QuantizeGraphInt8
from enginewright.passes.kernel.graph_module import GraphModule, graph_of
from enginewright.passes.kernel.statistics import InputStatistics
from tests.graphs import mixed, noise, tensor, write

CALLS = [{"x": torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
FIRED = ("conv", "grouped", "gemm", "plain", "matmul")


def loaded(path: Path) -> GraphModule:
    module = sources.load(f"onnx:{path}").module
    assert isinstance(module, GraphModule)
    return module


def quantized(path: Path, calls: list[dict[str, torch.Tensor]] = CALLS, **settings: object) -> Result:
    return QuantizeGraphInt8(**settings).apply(loaded(path), Context(calibration=calls))


def reasons(path: Path, calls: list[dict[str, torch.Tensor]] = CALLS, **settings: object) -> dict[str, str]:
    return dict(QuantizeGraphInt8(**settings).plan(loaded(path), Context(calibration=calls)).skipped)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return mixed(tmp_path / "m.onnx")


def one_node(path: Path, node: str, weight: np.ndarray, width: int, **attributes: object) -> Path:
    made = helper.make_node(node, ["x", "w"], ["y"], name="only", **attributes)
    return write(path, [made], [tensor("x", ["batch", width])], ["y"], {"w": weight})


def test_products_with_constant_weights_fire_and_every_other_has_a_reason(graph: Path) -> None:
    result = quantized(graph)
    assert result.changed == FIRED
    assert "no constant weight" in result.plan.skipped["scores"]
    assert "no constant weight" in result.plan.skipped["mixing"]
    assert "256 weights, fewer than 1024" in result.plan.skipped["small"]
    assert set(result.plan.skipped) == {"scores", "mixing", "small"}


def test_the_output_stays_close_and_does_move(graph: Path) -> None:
    x = {"x": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))}
    [wanted], [got] = loaded(graph)(**x), quantized(graph).model(**x)
    assert 0 < error(got, wanted) < 0.1


@pytest.mark.parametrize("name", FIRED)
def test_each_kind_alone_is_multiplied_by_its_rounded_weight(graph: Path, name: str) -> None:
    others = tuple(other for other in FIRED if other != name)
    result = quantized(graph, exclude=others)
    assert result.changed == (name,)
    [wanted], [got] = loaded(graph)(**CALLS[0]), result.model(**CALLS[0])
    assert 0 < error(got, wanted) < 0.04
    assert "excluded by" in result.plan.skipped[others[0]]


def test_pairs_are_symmetric_int8_and_weights_have_a_scale_per_output(graph: Path) -> None:
    rewritten = graph_of(quantized(graph).model)
    pairs = [node for node in rewritten.graph if node.op_type == "DequantizeLinear"]
    assert len(pairs) == 2 * len(FIRED)
    for node in pairs:
        stored, scale, zero = node.inputs
        assert zero.const_value is not None
        assert zero.dtype == ir.DataType.INT8
        assert not zero.const_value.numpy().any()
        if stored.const_value is not None:
            values = stored.const_value.numpy()
            axis = node.attributes.get_int("axis")
            assert scale.const_value.shape == (values.shape[axis],)
            others = tuple(i for i in range(values.ndim) if i != axis)
            assert (np.abs(values.astype(int)).max(axis=others) == 127).all()
    assert not {"Gemm"} & {node.op_type for node in rewritten.graph}


def test_no_float_weight_is_left_and_parameters_count_the_same(graph: Path) -> None:
    result = quantized(graph)
    assert result.after.parameter_count == result.before.parameter_count
    assert result.after.bytes < result.before.bytes / 2
    assert result.before.macs is None
    assert "matmul.w" not in graph_of(result.model).graph.initializers


def test_the_scale_is_the_largest_calibrated_value_over_127(graph: Path) -> None:
    plan = QuantizeGraphInt8().plan(loaded(graph), Context(calibration=CALLS))
    largest = max(float(call["x"].abs().max()) for call in CALLS)
    assert plan.choice["conv"].input_scale == pytest.approx(largest / 127, rel=1e-5)
    assert plan.choice["conv"].output_scale > 0
    assert plan.choice["gemm"].output_scale is None


def test_a_rewrite_from_the_written_plan_gives_the_same_graph(graph: Path) -> None:
    step = QuantizeGraphInt8()
    result = step.apply(loaded(graph), Context(calibration=CALLS))
    again = step.rewrite(loaded(graph), Plan.from_json(result.plan.as_json(), by=step.declared))
    one, two = (ir.to_proto(graph_of(module)).SerializeToString() for module in (result.model, again))
    assert one == two


def test_two_products_share_the_pair_of_their_input(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], name="one"),
        helper.make_node("MatMul", ["x", "b"], ["q"], name="two"),
        helper.make_node("Add", ["p", "q"], ["y"], name="sum"),
    ]
    weights = {"a": noise(32, 64), "b": noise(32, 64, seed=1)}
    path = write(tmp_path / "m.onnx", nodes, [tensor("x", ["batch", 32])], ["y"], weights)
    rewritten = graph_of(quantized(path, [{"x": torch.randn(4, 32)}]).model)
    assert sum(node.op_type == "QuantizeLinear" for node in rewritten.graph) == 1


@pytest.mark.parametrize(
    ("node", "weight", "attributes", "said"),
    [
        ("Gemm", noise(64, 64), {"transA": 1}, "transA"),
        ("MatMul", noise(64, 64).astype(np.float16), {}, "FLOAT16; only FLOAT"),
        ("MatMul", noise(4, 64, 64), {}, "3 dimensions"),
    ],
)
def test_what_must_not_fire(
    tmp_path: Path, node: str, weight: np.ndarray, attributes: dict[str, int], said: str
) -> None:
    kind = TensorProto.FLOAT16 if weight.dtype == np.float16 else TensorProto.FLOAT
    made = helper.make_node(node, ["x", "w"], ["h"], name="only", **attributes)
    cast = helper.make_node("Cast", ["h"], ["y"], name="cast", to=TensorProto.FLOAT)
    path = write(tmp_path / "m.onnx", [made, cast], [tensor("x", ["batch", 64], kind)], ["y"], {"w": weight})
    assert said in reasons(path)["only"]


def test_a_weight_on_the_left_is_left_alone(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["w", "x"], ["y"], name="only")
    path = write(tmp_path / "m.onnx", [node], [tensor("x", [64, "n"])], ["y"], {"w": noise(64, 64)})
    assert "on the left" in reasons(path)["only"]


def test_quantizing_twice_finds_everything_quantized(graph: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.onnx"
    ir.save(graph_of(quantized(graph).model), twice)
    found = reasons(twice)
    assert {found[name] for name in FIRED} == {"is already quantized"}


def test_other_layers_with_weights_are_named(tmp_path: Path) -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="up")
    path = write(tmp_path / "m.onnx", [node], [tensor("x", ["b", 16, 4, 4])], ["y"], {"w": noise(16, 8, 3, 3)})
    assert reasons(path, [{"x": torch.randn(1, 16, 4, 4)}])["up"] == (
        "ConvTranspose: only MatMul, Gemm, Conv are quantized"
    )


def test_inputs_that_are_zero_or_not_finite_are_skipped_with_that_reason(graph: Path) -> None:
    assert "is zero" in reasons(graph, [{"x": torch.zeros(1, 4, 8, 8)}])["conv"]
    assert "not finite" in reasons(graph, [{"x": torch.full((1, 4, 8, 8), torch.nan)}])["conv"]


def test_a_product_that_8_bits_spoil_is_left_alone_and_says_by_how_much(tmp_path: Path) -> None:
    weight = noise(64, 64)
    cancelling = weight - weight.mean(axis=0, keepdims=True)  # every column sums to zero: a common offset goes
    path = one_node(tmp_path / "m.onnx", "MatMul", cancelling, 64)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    [spoiled] = [{"x": 100 + 0.1 * x}]
    assert set(reasons(path, [spoiled])) == {"only"}
    said = reasons(path, [spoiled])["only"]
    told = float(said.removeprefix("its own relative error in 8 bits is ").partition(" ")[0])
    assert quantized(path, [spoiled]).changed == ()
    forced = quantized(path, [spoiled], max_error=1e6)
    assert forced.changed == ("only",)
    wanted = spoiled["x"] @ torch.from_numpy(cancelling)
    assert told == pytest.approx(error(forced.model(**spoiled)[0], wanted), rel=0.1)
    assert told > 0.25
    assert quantized(path, [{"x": x}]).changed == ("only",)


def test_an_exclusion_that_matches_nothing_is_an_error(graph: Path) -> None:
    with pytest.raises(ToolchainError, match=r"exclude 'cnv\*' matches no node"):
        quantized(graph, exclude=("cnv*",))


def test_it_refuses_a_module(graph: Path) -> None:
    with pytest.raises(ToolchainError, match="quantize_graph_int8 works on ONNX graphs"):
        QuantizeGraphInt8().apply(torch.nn.Linear(2, 2), Context(calibration=CALLS))


@pytest.mark.parametrize("opset", [9, 11])
def test_an_old_opset_is_raised(tmp_path: Path, opset: int) -> None:
    path = mixed(tmp_path / "old.onnx", opset=opset)
    result = quantized(path)
    assert graph_of(result.model).opset_imports[""] == result.plan.facts.opset == 13
    [wanted], [got] = loaded(path)(**CALLS[0]), result.model(**CALLS[0])
    assert 0 < error(got, wanted) < 0.1


def test_an_old_opset_that_cannot_be_raised_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no adapter for Scan")

    monkeypatch.setattr("onnx.version_converter.convert_version", refuse)
    with pytest.raises(ToolchainError, match="need opset 13; the graph has 9 and could not be raised: no adapter for"):
        quantized(mixed(tmp_path / "old.onnx", opset=9))


def test_patches_are_what_an_unfolded_convolution_reads() -> None:
    x, weight = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 3, 2)
    seen = InputStatistics(0)
    look_at_patches(x, (3, 2), (1, 2), seen)
    patches = seen.rows()  # (R, P * C): all 3 * 4 places, and one again
    wanted = torch.nn.functional.conv2d(x, weight, dilation=(1, 2)).flatten(2)[0].T  # (12, 4)
    got = patches[:-1] @ weight.movedim(1, -1).flatten(1).T
    torch.testing.assert_close(got, wanted)
    assert patches[-1].abs().max() == x.abs().max() == seen.sizes.largest.max()


def test_a_grouped_convolution_is_read_group_by_group(graph: Path) -> None:
    node = next(node for node in loaded(graph).graph.graph if node.name == "grouped")
    product = product_of(node)
    assert isinstance(product, Product)
    x = torch.randn(1, 32, 4, 4)
    weight, seen = product.constant(), InputStatistics(0)
    product.look(x, seen)
    parts = product.by_group(seen.sample.rows)  # the 2 x 2 places without padding
    got = torch.cat([rows @ part.T for rows, part in parts], dim=1)
    wanted = torch.nn.functional.conv2d(x, weight, groups=4).flatten(2)[0].T
    torch.testing.assert_close(got, wanted)
