"""Weights of 4 bits: PyTorch holds each in a byte, ONNX two in a byte.

A module names the 4-bit type by a Cast before the DequantizeLinear; ``pack`` carries that Cast out. ONNX Runtime's
CPU multiplies int4 weights itself (MatMulNBits) and knows no 4-bit floats, which ``multiply_out`` turns to float32.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

TYPES: dict[ir.DataType, Any] = {
    ir.DataType.INT4: ml_dtypes.int4,
    ir.DataType.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
}


def pack(model: ir.Model) -> int:
    """Let each Cast of an initializer to 4 bits be an initializer of 4 bits; returns how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Cast" or node.attributes.get_int("to") not in set(TYPES):
            continue
        [source], [result] = node.inputs, node.outputs
        assert source is not None
        constant = source.const_value
        assert constant is not None, "only constants are cast to 4 bits"
        name = f"{source.name}.packed"
        if name not in model.graph.initializers:
            model.graph.register_initializer(packed(name, constant, ir.DataType(node.attributes.get_int("to"))))
        ir.convenience.replace_all_uses_with(result, model.graph.initializers[name])
        model.graph.remove(node, safe=True)
        count += 1
    return count


def packed(name: str, constant: Any, dtype: ir.DataType) -> ir.Value:
    """An initializer of 4 bits, converted when it is written."""

    def convert() -> Any:
        values: npt.NDArray[np.generic] = constant.numpy()
        return ir.Tensor(values.astype(np.float32).astype(TYPES[dtype]), dtype=dtype, name=name)

    shape = ir.Shape(tuple(constant.shape))
    lazy = ir.LazyTensor(convert, dtype=dtype, shape=shape, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)


def multiply_out(model: ir.Model) -> int:
    """Replace each weight of 4-bit floats by its values in float32; returns how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        weight, scale = node.inputs[:2]
        if weight is None or scale is None or weight.const_value is None:
            continue
        if weight.const_value.dtype != ir.DataType.FLOAT4E2M1:
            continue
        scales = known(scale)
        axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
        values = weight.const_value.numpy().astype(np.float32) * np.repeat(scales, block, axis=axis)
        name = f"{weight.name}.float"
        model.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(values, name=name)))
        ir.convenience.replace_all_uses_with(node.outputs[0], model.graph.initializers[name])
        model.graph.remove(node, safe=True)
        count += 1
    return count


def known(scale: ir.Value) -> npt.NDArray[np.float32]:
    """Scales as numbers: a constant, or one that is dequantized itself."""
    if scale.const_value is not None:
        return scale.const_value.numpy().astype(np.float32)
    node = scale.producer()
    assert node is not None, "scales are constants, or dequantized"
    parts = [
        value.const_value.numpy() for value in node.inputs[:2] if value is not None and value.const_value is not None
    ]
    assert len(parts) == 2, "scales are dequantized from constants"
    return parts[0].astype(np.float32) * parts[1].astype(np.float32)
