"""Post-training W8A8 of an ONNX graph: MatMul, Gemm and Conv with constant weights, scales from calibration data.

Sources: as ``quantize_int8``, which does the same to PyTorch modules. Both sides are symmetric int8, activations per
tensor and weights per output channel, written as QuantizeLinear and DequantizeLinear pairs: the only form that
TensorRT reads too. A Gemm becomes MatMul and Add. Graphs older than opset 13, which knows no scales per channel, are
raised to it.

A product whose own error is far too high stays as it is. Of the 235 products of eight networks in use (silero's voice
detector in two forms, three of rapidocr's, classifiers of images and of files, speech quality), calibrated
on random inputs, all were wrong by 7 % or less but for one convolution of silero's, by 77 %: its terms nearly cancel.
The bound of 25 % lies well between.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_GRAPH, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.graph.pairs import PairWriter
from enginewright.passes.graph.products import KINDS, PATCHES, Product, product_of, reason_for_other
from enginewright.passes.kernel.graph_module import GraphModule, graph_of
from enginewright.passes.kernel.observe import calls_of
from enginewright.passes.kernel.scales import Int8Product, Observer, arithmetic, error_in_8_bits, scale_of, unusable
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.kernel.statistics import ROWS, InputStatistics

OPSET = 13
"""First opset whose QuantizeLinear knows an axis."""


class Seen(NamedTuple):
    """What was seen of a product's input, and of a convolution's output."""

    input: InputStatistics
    output: InputStatistics | None


class QuantizedProduct(Int8Product):
    """How a product of a graph is computed in 8 bits."""

    output_scale: float | None = Field(None, description="of a convolution's output")


class GraphFacts(Facts):
    """What the graph was calibrated on."""

    calibration_calls: int = Field(description="calls")
    opset: int = Field(description="of the graph")


class QuantizeGraphInt8(Pass):
    """Put 8-bit pairs before the products of an ONNX graph: symmetric, weights per channel, activations per tensor."""

    works_on: ClassVar[Literal["module", "graph"]] = "graph"
    needs_calibration: ClassVar[bool] = True
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_GRAPH,)
    destroys: ClassVar[tuple[Fact, ...]] = (FLOAT_GRAPH,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (QuantizedProduct,)
    facts: ClassVar[type[Facts]] = GraphFacts

    observer: Observer = Field(
        "max", description="how an activation's scale is chosen: largest value, a percentile, or least squared error"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="percentile of magnitudes, for observer=percentile")
    exclude: tuple[str, ...] = Field((), description="glob patterns of node names that stay as they are")
    max_error: float = Field(
        0.25, gt=0, description="products whose own relative error in 8 bits is above this stay as they are"
    )
    smallest: int = Field(1024, ge=0, description="nodes with fewer weights than this stay as they are")

    @property
    def formats(self) -> tuple[str, ...]:
        """What it writes."""
        return ("int8",)

    def plan(self, model: nn.Module, context: Context) -> Plan[QuantizedProduct]:
        """Choose a scale for each product's input, and find where a CPU's 16-bit sums would saturate."""
        before = graph_of(model)
        graph = at_opset(before)
        products, skipped = self.sort(graph)
        check_patterns(self.exclude, [*products, *skipped], what="node")
        seen = record(graph, products, context, histogram=self.observer == "percentile")
        choice: dict[str, QuantizedProduct] = {}
        for number, (name, product) in enumerate(products.items()):
            context.say(number, len(products), f"choosing scales: {name}")
            if reason := unusable(seen[name].input):
                skipped[name] = reason
                continue
            decision = self.choose(product, seen[name])
            error = error_in_8_bits(product.by_group(seen[name].input.rows()), decision.input_scale)
            if error > self.max_error:
                skipped[name] = f"its own relative error in 8 bits is {error:.2g} on the calibration inputs"
            else:
                choice[name] = decision
        facts = GraphFacts(calibration_calls=len(context.calibration), opset=graph.opset_imports[""])
        return Plan(choice=choice, skipped=skipped, facts=facts)

    def sort(self, graph: ir.Model) -> tuple[dict[str, Product], dict[str, str]]:
        """Products to quantize by node name, and reasons for every other node that holds weights."""
        products: dict[str, Product] = {}
        skipped: dict[str, str] = {}
        for node in graph.graph.all_nodes():
            name = node.name or ""
            found = product_of(node) if node.op_type in KINDS and not node.domain else None
            if isinstance(found, Product):
                products[name] = found
                reason = self.reason_to_skip(found, graph)
            else:
                reason = found or reason_for_other(node, self.smallest)
            if reason:
                skipped[name] = reason
        products = {name: product for name, product in products.items() if name not in skipped}
        return products, skipped

    def reason_to_skip(self, product: Product, graph: ir.Model) -> str:
        """Why a product stays as it is; empty when it does not."""
        if reason := excluded_by(product.node.name or "", self.exclude):
            return reason
        if product.node.graph is not graph.graph:
            return "stands in a branch or a loop"
        assert product.weight.const_value is not None
        if product.weight.const_value.size < self.smallest:
            return f"has {product.weight.const_value.size} weights, fewer than {self.smallest}"
        return ""

    def choose(self, product: Product, seen: Seen) -> QuantizedProduct:
        """The input's scale, a convolution's output's, and whether 16-bit sums saturate in any of its groups."""
        scale = partial(scale_of, observer=self.observer, percentile=self.percentile)
        scales = {"input_scale": scale(seen.input)}
        if seen.output is not None and not unusable(seen.output):
            scales["output_scale"] = scale(seen.output)
        plain = product.node.op_type != "Conv"
        sums = [arithmetic(rows, weight, products=plain) for rows, weight in product.by_group(seen.input.rows())]
        worst = max(sums, key=lambda found: (found["reduced_range"], found["saturating_share"]))
        return QuantizedProduct(precision="int8", **scales, **worst)

    def rewrite(self, model: nn.Module, plan: Plan[QuantizedProduct]) -> nn.Module:
        """Give each planned product its pairs, in a copy of the graph."""
        graph = at_opset(graph_of(model).clone())
        writer = PairWriter(graph)
        for node in list(graph.graph):
            if decision := plan.choice.get(node.name or ""):
                product = product_of(node)
                assert isinstance(product, Product), f"{node.name} is no product any more: {product}"
                writer.quantize(product, decision.input_scale)
        common.RemoveUnusedNodesPass()(graph)
        return GraphModule(graph)


def at_opset(graph: ir.Model) -> ir.Model:
    """The graph itself, or a copy of an older one raised to opset 13.

    Raises:
        ToolchainError: it cannot be raised.
    """
    found = graph.opset_imports.get("", OPSET)
    if found >= OPSET:
        return graph
    try:
        raised = onnx.version_converter.convert_version(ir.to_proto(graph), OPSET)
    except Exception as cause:  # the converter raises RuntimeError and its own classes
        raise ToolchainError(
            f"8-bit scales per channel need opset {OPSET}; the graph has {found} and could not be raised: {cause}",
            help="export it again with a newer opset",
        ) from cause
    model = ir.from_proto(raised)
    common.NameFixPass()(model)
    return model


def record(graph: ir.Model, products: Mapping[str, Product], context: Context, *, histogram: bool) -> dict[str, Seen]:
    """Statistics of what flows into each product, and out of each convolution, over the calibration calls."""
    wanted = [p.activation.name or "" for p in products.values()]
    wanted += [p.node.outputs[0].name or "" for p in products.values() if p.is_convolution]
    given = {value.name for value in graph.graph.inputs}
    names = [name for name in dict.fromkeys(wanted) if name not in given]
    runner = probe(graph, names) if names else None

    def empty(most: int) -> InputStatistics:
        return InputStatistics(context.seed, histogram=histogram, most=most)

    seen = {
        name: Seen(empty(PATCHES), empty(PATCHES)) if product.is_convolution else Seen(empty(ROWS), None)
        for name, product in products.items()
    }
    for inputs in calls_of(context, "calibrating"):
        met = {**inputs, **(dict(zip(names, runner(**inputs), strict=True)) if runner else {})}
        for name, product in products.items():
            found = seen[name]
            product.look(met[product.activation.name or ""], found.input)
            if found.output is not None:
                product.look_at_output(met[product.node.outputs[0].name or ""], found.output)
    return seen


def probe(graph: ir.Model, names: list[str]) -> GraphModule:
    """The graph with these float values as its outputs."""
    copy = graph.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    for name in names:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
    copy.graph.outputs[:] = [values[name] for name in names]
    return GraphModule(copy)
