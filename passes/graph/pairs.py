"""Writing QuantizeLinear and DequantizeLinear pairs into an ONNX graph.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from enginewright.passes.graph.products import Product
from enginewright.passes.kernel.rounding import QMAX, QMIN, weight_scales


class PairWriter:
    """Quantizes products of one graph; what several products share is written once.

    Products must come in the graph's order, so that a shared pair stands before all that read it.
    """

    def __init__(self, graph: ir.Model) -> None:
        self.graph = graph.graph
        self.inputs: dict[tuple[str, float], ir.Value] = {}
        self.weights: dict[tuple[str, str, float, int], ir.Value] = {}

    def quantize(self, product: Product, scale: float) -> None:
        """Let a product read a dequantized input and a dequantized int8 weight; a Gemm becomes MatMul and Add."""
        node = product.node
        node.metadata_props["module"] = node.name or ""  # targets look up what the plan says by this
        activation, weight = self.input_pair(product, scale), self.dequantized_weight(product)
        if node.op_type == "Gemm":
            self.split_gemm(node, activation, weight)
        else:
            node.replace_input_with(0, activation)
            node.replace_input_with(1, weight)

    def split_gemm(self, gemm: ir.Node, activation: ir.Value, weight: ir.Value) -> None:
        """x W + bias, in two nodes."""
        [output] = gemm.outputs
        bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        product = ir.node("MatMul", [activation, weight], name=gemm.name, metadata_props=dict(gemm.metadata_props))
        nodes = [product]
        if bias is not None:
            nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{gemm.name}.bias"))
            product.outputs[0].name = f"{gemm.name}.product"
        last = nodes[-1].outputs[0]
        last.name, last.shape, last.type = output.name, output.shape, output.type
        self.graph.insert_before(gemm, nodes)
        ir.convenience.replace_all_uses_with(output, last, replace_graph_outputs=True)
        self.graph.remove(gemm, safe=True)

    def input_pair(self, product: Product, scale: float) -> ir.Value:
        """The activation, rounded to int8 and back."""
        activation, name = product.activation, f"{product.activation.name}.int8"
        key = (name, scale)
        if key not in self.inputs:
            if any(known == name for known, _ in self.inputs):
                name = f"{name}.{product.node.name}"
            step = self.constant(f"{name}.scale", np.array(scale, np.float32))
            zero = self.constant(f"{name}.zero", np.array(0, np.int8))
            quantize = ir.node("QuantizeLinear", [activation, step, zero], name=f"{name}.quantize")
            quantize.outputs[0].name = name
            back = ir.node("DequantizeLinear", [quantize.outputs[0], step, zero], name=f"{name}.dequantize")
            self.inputs[key] = self.insert(product.node, [quantize, back], activation.shape)
        return self.inputs[key]

    def dequantized_weight(self, product: Product) -> ir.Value:
        """The weight in int8, (K, N) for matrices and as it stands for a convolution, and its DequantizeLinear."""
        node, convolution = product.node, product.is_convolution
        alpha, transposed = node.attributes.get_float("alpha", 1.0), node.attributes.get_int("transB", 0)
        key = (product.weight.name or "", "" if convolution else "matrix", alpha, transposed)
        if key not in self.weights:
            name = f"{product.node.name}.weight"
            matrix = product.constant().flatten(1) if convolution else product.matrix()  # (N, K)
            scale = weight_scales(matrix)
            rounded = int8(matrix, scale)
            stored = rounded.reshape(product.constant().shape) if convolution else rounded.T.copy()
            weight = self.constant(f"{name}.int8", stored)
            step = self.constant(f"{name}.scale", scale.numpy())
            zero = self.constant(f"{name}.zero", np.zeros(len(matrix), np.int8))
            back = ir.node(
                "DequantizeLinear",
                [weight, step, zero],
                name=f"{name}.dequantize",
                attributes={"axis": 0 if convolution else 1},
            )
            self.weights[key] = self.insert(node, [back], ir.Shape(stored.shape))
        return self.weights[key]

    def insert(self, before: ir.Node, nodes: list[ir.Node], shape: ir.Shape | None) -> ir.Value:
        """Put nodes before another; the last one's output, a float of this shape."""
        result = nodes[-1].outputs[0]
        result.name, result.shape, result.type = nodes[-1].name, shape, ir.TensorType(ir.DataType.FLOAT)
        for node in nodes:
            node.metadata_props["module"] = before.metadata_props["module"]
        self.graph.insert_before(before, nodes)
        return result

    def constant(self, name: str, values: np.ndarray) -> ir.Value:
        """A new initializer."""
        value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
        value.shape, value.type = ir.Shape(values.shape), ir.TensorType(ir.DataType.from_numpy(values.dtype))
        self.graph.register_initializer(value)
        return value


def int8(matrix: Tensor, scale: Tensor) -> np.ndarray:
    """Rows of a matrix (N, K) over their scales (N,), rounded."""
    return (matrix / scale[:, None]).round().clamp(QMIN, QMAX).numpy().astype(np.int8)
