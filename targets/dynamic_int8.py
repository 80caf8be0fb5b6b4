"""Lower static 8-bit products to dynamic ones, which ONNX Runtime often runs faster and more accurately on a CPU.

A static product reads ``DequantizeLinear(QuantizeLinear(x))`` with a scale fixed at calibration. The dynamic form
measures x at each call: ``DynamicQuantizeLinear`` and ``MatMulInteger``, which ONNX Runtime fuses into one kernel. One
scale for all of x is poor where rows (tokens) differ much in size. In layers that a pass marked ``rows``, each row is
first brought to the range 0 to 1, which gives it a scale of its own. With lo and r a row's smallest value and its
range, x W = ((x - lo) / r) W r + lo (1 W).

Convolutions have no fast dynamic kernel: that form multiplies their 8-bit weights out again and computes in floats. In
the static form ONNX Runtime computes one in 8 bits only if its output is rounded too, which ``add_output_pairs`` does.

On x86 without VNNI the 8-bit product adds two neighbours u8*s8 in 16 bits and saturates; ``reduce_range`` gives the
layers where that happens weights of 7 bits, which cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from enginewright.targets.contract import LayerHint
from enginewright.targets.onnx_export import module_path


class Product(NamedTuple):
    """A product of a quantized activation and a constant int8 weight: its node, and the values behind it."""

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    scale: ir.Value
    axis: int

    def float_weight(self) -> npt.NDArray[np.float32]:
        """The weight multiplied by its scales, which lie along ``axis``."""
        assert self.weight.const_value is not None
        assert self.scale.const_value is not None
        scale = self.scale.const_value.numpy()
        if scale.ndim:
            scale = scale.reshape([-1 if i == self.axis else 1 for i in range(len(self.weight.const_value.shape))])
        with np.errstate(all="ignore"):  # a scale that is not finite is validation's to find
            return self.weight.const_value.numpy().astype(np.float32) * scale


def static_products(model: ir.Model) -> Iterator[Product]:
    """Every product whose two sides are dequantized, the right one from a constant."""
    for node in list(model.graph):
        if node.op_type not in ("MatMul", "Conv"):
            continue
        left, right = (value.producer() if value is not None else None for value in node.inputs[:2])
        if left is None or right is None or left.op_type != "DequantizeLinear" or right.op_type != "DequantizeLinear":
            continue
        quantize = left.inputs[0].producer() if left.inputs[0] is not None else None
        weight, scale = right.inputs[0], right.inputs[1]
        if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.inputs[0] is None:
            continue
        if weight is None or scale is None or weight.const_value is None:
            continue
        if weight.const_value.dtype == ir.DataType.INT8 and not right.attributes.get_int("block_size", 0):
            yield Product(node, quantize.inputs[0], weight, scale, right.attributes.get_int("axis", 1))


def to_dynamic(model: ir.Model, rows: Collection[str] = ()) -> int:
    """Rewrite every static product; returns how many became dynamic. Nodes that nothing uses are left for ``save``.

    Args:
        model: changed in place.
        rows: modules whose input gets a scale for each row.
    """
    measured: dict[tuple[ir.Value, bool], ir.Node] = {}
    normalised: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    count = 0
    for product in static_products(model):
        node, activation, weight, scale, _ = product
        if node.op_type == "Conv":
            in_floats(model, product)
            continue
        by_row = module_path(node) in rows
        before = Nodes(node, count)
        source = activation
        if by_row:
            if activation not in normalised:
                normalised[activation] = normalise_rows(model, before, activation)
            source = normalised[activation][0]
        if (activation, by_row) not in measured:
            measured[activation, by_row] = before.add("DynamicQuantizeLinear", source, outputs=3).node
        quantized, step, zero = measured[activation, by_row].outputs
        integers = before.add("MatMulInteger", quantized, weight, zero)
        as_float = before.add("Cast", integers.value, attributes={"to": ir.DataType.FLOAT})
        steps = before.add("Mul", step, scale)
        result = before.add("Mul", as_float.value, steps.value)
        if by_row:
            _, low, span = normalised[activation]
            ones = constant(model, f"{weight.name}_sums", column_sums(weight, scale))
            scaled, shifted = before.add("Mul", result.value, span), before.add("Mul", low, ones)
            result = before.add("Add", scaled.value, shifted.value)
        old, new = node.outputs[0], result.value
        new.name, new.shape, new.type = old.name, old.shape, old.type  # it may be the graph's output
        model.graph.insert_before(node, before.nodes)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        count += 1
    return count


class Added(NamedTuple):
    """A new node and its first output."""

    node: ir.Node
    value: ir.Value


class Nodes:
    """Nodes that take an old one's place, with its metadata and names derived from its output's."""

    def __init__(self, old: ir.Node, number: int) -> None:
        self.old, self.number = old, number
        self.nodes: list[ir.Node] = []

    def add(
        self, op: str, *inputs: ir.Value, outputs: int = 1, attributes: Mapping[str, ir.DataType | int] | None = None
    ) -> Added:
        """Append a node."""
        node = ir.node(op, inputs, attributes=attributes, num_outputs=outputs)
        node.metadata_props.update(self.old.metadata_props)
        for i, value in enumerate(node.outputs):
            value.name = f"{self.old.outputs[0].name}_{op}_{self.number}_{len(self.nodes)}_{i}"
        self.nodes.append(node)
        return Added(node, node.outputs[0])


def normalise_rows(model: ir.Model, before: Nodes, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Rows of x brought to 0 .. 1, each row's smallest value, and its range."""
    last = constant(model, "rows_axis", np.array([-1], np.int64))
    least = constant(model, "rows_least", np.array(1e-12, np.float32))
    low = before.add("ReduceMin", x, last, attributes={"keepdims": 1}).value
    high = before.add("ReduceMax", x, last, attributes={"keepdims": 1}).value
    span = before.add("Max", before.add("Sub", high, low).value, least).value
    return before.add("Div", before.add("Sub", x, low).value, span).value, low, span


def constant(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """An initializer; one name is made once."""
    if name not in model.graph.initializers:
        model.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    return model.graph.initializers[name]


def column_sums(weight: ir.Value, scale: ir.Value) -> npt.NDArray[np.float32]:
    """What a row of ones gives: int8 weight (K, N) times scale (N,) -> (N,)."""
    assert weight.const_value is not None
    assert scale.const_value is not None
    sums: npt.NDArray[np.int64] = weight.const_value.numpy().astype(np.int64).sum(axis=0)
    return (sums * scale.const_value.numpy()).astype(np.float32)


def to_float(model: ir.Model) -> int:
    """Take the 8 bits out of every static product again, to time the same graph in fp32; returns how many."""
    products = list(static_products(model))
    for product in products:
        in_floats(model, product)
    return len(products)


def in_floats(model: ir.Model, product: Product) -> None:
    """Let one product read its activation as it is, and its weight multiplied out."""
    name = f"{product.weight.name}_float"
    if name not in model.graph.initializers:
        model.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(product.float_weight(), name=name)))
    product.node.replace_input_with(0, product.activation)
    product.node.replace_input_with(1, model.graph.initializers[name])


def add_output_pairs(model: ir.Model, hints: Mapping[str, LayerHint]) -> int:
    """Round the outputs of convolutions to int8 where a pass chose an ``output_scale``, by module path; how many."""
    count = 0
    for product in list(static_products(model)):
        [output] = product.node.outputs
        scale = hints.get(module_path(product.node), LayerHint()).output_scale
        if product.node.op_type != "Conv" or scale is None:
            continue
        readers = list(output.uses())
        constants = []
        for kind, value in (("scale", np.array(scale, np.float32)), ("zero", np.array(0, np.int8))):
            name = f"{output.name}.output.{kind}"
            constants.append(ir.Value(name=name, const_value=ir.tensor(value, name=name)))
            model.graph.register_initializer(constants[-1])
        quantize = ir.node("QuantizeLinear", [output, *constants])
        back = ir.node("DequantizeLinear", [quantize.outputs[0], *constants])
        quantize.outputs[0].name, back.outputs[0].name = f"{output.name}.int8.output", f"{output.name}.output"
        back.outputs[0].shape, back.outputs[0].type = output.shape, output.type
        for use in readers:
            use.node.replace_input_with(use.idx, back.outputs[0])
        model.graph.insert_after(product.node, [quantize, back])
        count += 1
    return count


def reduce_range(model: ir.Model, reduced: Collection[str]) -> int:
    """Halve the int8 weights of the layers named in ``reduced`` (module paths), double their scales; how many.

    Halving an 8-bit weight rounds a second time: its error is about a third above that of rounding once to 7 bits.
    """
    changed: dict[tuple[ir.Value, ir.Value], None] = {}
    for node, _, weight, scale, _ in static_products(model):
        if module_path(node) in reduced and weight.const_value is not None and scale.const_value is not None:
            changed[weight, scale] = None  # a layer that is called twice has two products
    for weight, scale in changed:
        assert weight.const_value is not None
        assert scale.const_value is not None
        halves = np.rint(weight.const_value.numpy().astype(np.float32) / 2).astype(np.int8)
        twice = scale.const_value.numpy() * np.float32(2)
        readers = [use.node for use in weight.uses() if use.idx == 0 and use.node.inputs[1] is scale]
        new: list[tuple[ir.Value, npt.NDArray[Any]]] = [(weight, halves), (scale, twice)]
        for place, (value, array) in enumerate(new):
            if all(use.node in readers for use in value.uses()):
                value.const_value = ir.tensor(array, name=value.name)
                continue
            own = with_constant(model, value, array)  # another layer reads this weight, or this scale
            for reader in readers:
                reader.replace_input_with(place, own)
    return len(changed)


def with_constant(model: ir.Model, like: ir.Value, array: npt.NDArray[Any]) -> ir.Value:
    """A new constant of a graph, named after another."""
    name = f"{like.name}.7bit"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=like.shape, type=like.type)
    model.graph.register_initializer(value)
    return value
