"""Lower static 8-bit products to dynamic ones, which ONNX Runtime often runs faster and more accurately on a CPU.

A static product reads ``DequantizeLinear(QuantizeLinear(x))`` with a scale fixed at calibration. The dynamic form
measures x at each call: ``DynamicQuantizeLinear`` and ``MatMulInteger``, which ONNX Runtime fuses into one kernel. One
scale for all of x is poor where rows (tokens) differ much in size. In layers that a pass marked ``rows``, each row is
first brought to the range 0 to 1, which gives it a scale of its own. With lo and r a row's smallest value and its
range, x W = ((x - lo) / r) W r + lo (1 W).

On x86 without VNNI the 8-bit product adds two neighbours u8*s8 in 16 bits and saturates; ``reduce_range`` gives the
layers where that happens weights of 7 bits, which cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from targets.onnx_export import module_path


class Product(NamedTuple):
    """A product of a quantized activation and a constant int8 weight: its node, and the values behind it."""

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    scale: ir.Value


def static_products(model: ir.Model) -> Iterator[Product]:
    """Every product whose two sides are dequantized, the right one from a constant."""
    for node in list(model.graph):
        if node.op_type != "MatMul":
            continue
        left, right = (value.producer() if value is not None else None for value in node.inputs)
        if left is None or right is None or left.op_type != "DequantizeLinear" or right.op_type != "DequantizeLinear":
            continue
        quantize = left.inputs[0].producer() if left.inputs[0] is not None else None
        weight, scale = right.inputs[0], right.inputs[1]
        if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.inputs[0] is None:
            continue
        if weight is not None and scale is not None and weight.const_value is not None:
            yield Product(node, quantize.inputs[0], weight, scale)


def to_dynamic(model: ir.Model, rows: Collection[str] = ()) -> int:
    """Rewrite every static product; returns how many. Nodes that nothing uses any more are left for ``save``.

    Args:
        model: changed in place.
        rows: modules whose input gets a scale for each row.
    """
    measured: dict[tuple[ir.Value, bool], ir.Node] = {}
    normalised: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    count = 0
    for node, activation, weight, scale in static_products(model):
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
        product = before.add("MatMulInteger", quantized, weight, zero)
        as_float = before.add("Cast", product.value, attributes={"to": ir.DataType.FLOAT})
        steps = before.add("Mul", step, scale)
        result = before.add("Mul", as_float.value, steps.value)
        if by_row:
            _, low, span = normalised[activation]
            ones = constant(model, f"{weight.name}_sums", column_sums(weight, scale))
            scaled, shifted = before.add("Mul", result.value, span), before.add("Mul", low, ones)
            result = before.add("Add", scaled.value, shifted.value)
        result.value.shape, result.value.type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, before.nodes)
        ir.convenience.replace_all_uses_with(node.outputs[0], result.value, replace_graph_outputs=True)
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
    count = 0
    for node, activation, weight, scale in static_products(model):
        assert weight.const_value is not None
        assert scale.const_value is not None
        with np.errstate(all="ignore"):  # a scale that is not finite is validation's to find
            values = weight.const_value.numpy().astype(np.float32) * scale.const_value.numpy()  # (K, N)
        name = f"{weight.name}_float"
        model.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(values, name=name)))
        node.replace_input_with(0, activation)
        node.replace_input_with(1, model.graph.initializers[name])
        count += 1
    return count


def reduce_range(model: ir.Model, reduced: Collection[str]) -> int:
    """Halve the int8 weights of the layers named in ``reduced`` (module paths), double their scales; how many.

    Halving an 8-bit weight rounds a second time: its error is about a third above that of rounding once to 7 bits.
    """
    count = 0
    for node, _, weight, scale in static_products(model):
        if module_path(node) not in reduced or weight.const_value is None or scale.const_value is None:
            continue
        halves = np.rint(weight.const_value.numpy().astype(np.float32) / 2).astype(np.int8)
        weight.const_value = ir.tensor(halves, name=weight.name)
        scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(2), name=scale.name)
        count += 1
    return count
