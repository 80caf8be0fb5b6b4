"""Lower static 8-bit products to dynamic ones, which ONNX Runtime often runs faster and more accurately on a CPU.

A static product reads ``DequantizeLinear(QuantizeLinear(x))`` with a scale fixed at calibration. The dynamic form
measures x at each call: ``DynamicQuantizeLinear`` and ``MatMulInteger``, which ONNX Runtime fuses into one kernel.

On x86 without VNNI the 8-bit product adds two neighbours u8*s8 in 16 bits and saturates; ``reduce_range`` gives the
layers where that happens weights of 7 bits, which cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
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


def to_dynamic(model: ir.Model) -> int:
    """Rewrite every static product; returns how many. Nodes that nothing uses any more are left for ``save``."""
    measured: dict[ir.Value, ir.Node] = {}
    count = 0
    for node, activation, weight, scale in static_products(model):
        before: list[ir.Node] = []
        if activation not in measured:
            measured[activation] = ir.node("DynamicQuantizeLinear", [activation], num_outputs=3)
            before.append(measured[activation])
        quantized, step, zero = measured[activation].outputs
        product = ir.node("MatMulInteger", [quantized, weight, zero])
        as_float = ir.node("Cast", [product.outputs[0]], attributes={"to": ir.DataType.FLOAT})
        steps = ir.node("Mul", [step, scale])
        result = ir.node("Mul", [as_float.outputs[0], steps.outputs[0]])
        before += [product, as_float, steps, result]
        for new in before:
            new.metadata_props.update(node.metadata_props)
            for i, value in enumerate(new.outputs):
                value.name = f"{node.outputs[0].name}_{new.op_type}_{count}_{i}" + ("_out" if new is result else "")
        result.outputs[0].shape, result.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, before)
        ir.convenience.replace_all_uses_with(node.outputs[0], result.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def to_float(model: ir.Model) -> int:
    """Take the 8 bits out of every static product again, to time the same graph in fp32; returns how many."""
    count = 0
    for node, activation, weight, scale in static_products(model):
        assert weight.const_value is not None
        assert scale.const_value is not None
        with np.errstate(all="ignore"):  # a scale that is not finite is validation's to find
            values = weight.const_value.numpy().astype(np.float32) * scale.const_value.numpy()  # (K, N)
        name = f"{weight.name}_float"
        if name not in model.graph.initializers:  # a layer that is called twice has two products
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
    halved: set[ir.Value] = set()
    for node, _, weight, scale in static_products(model):
        if weight in halved:  # a layer that is called twice has two products
            continue
        if module_path(node) not in reduced or weight.const_value is None or scale.const_value is None:
            continue
        halved.add(weight)
        halves = np.rint(weight.const_value.numpy().astype(np.float32) / 2).astype(np.int8)
        weight.const_value = ir.tensor(halves, name=weight.name)
        scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(2), name=scale.name)
        count += 1
    return count
