"""Translations of operators that the exporter's own get wrong; each says what it mends."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

REACH = 40
"""Values that are looked at behind a float mask for an infinity."""


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator -> its translation."""
    return {
        torch.ops.aten.squeeze.dim: squeeze,
        operator.floordiv: floor_divide,
        torch.ops.aten.scaled_dot_product_attention.default: attention,
    }


def operators() -> Any:
    """ONNX's operators as onnxscript offers them; their methods are typed for scripts, which these are not."""
    import onnxscript

    return onnxscript.opset18


def squeeze(x: ir.Value, dim: int) -> Any:
    """Leave a dimension that is not 1, as PyTorch does; the exporter's own translation writes an invalid Squeeze."""
    op = operators()
    assert x.shape is not None
    return op.Squeeze(x, op.Constant(value_ints=[dim])) if x.shape[dim] == 1 else op.Identity(x)


def floor_divide(a: Any, b: Any) -> Any:
    """Round sizes down, as Python does; the exporter's own translation rounds negative ones, as in a crop, up."""
    op = operators()
    return op.Div(op.Sub(a, op.Mod(a, b)), b)


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Give zeros where a mask hides a whole row, as PyTorch does; the exporter's own gives the values' mean, or NaN.

    Shapes: query (B, H, N, D), key and value (B, H', M, D), mask broadcastable to (B, H, N, M).
    """
    width = query.shape[-1]
    if attn_mask is None or not isinstance(width, int) or not may_hide_a_row(attn_mask):
        from onnxscript.function_libs.torch_lib.ops import nn as library

        return library.aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    op = operators()
    if enable_gqa and query.shape[1] != key.shape[1]:
        key, value = (repeated(x, query.shape[1] // key.shape[1]) for x in (key, value))

    def number(of: float) -> Any:
        return op.Constant(value=ir.tensor(of, dtype=query.dtype))

    root = number(math.sqrt(width**-0.5 if scale is None else scale))  # on both sides, as PyTorch scales
    scores = op.MatMul(op.Mul(query, root), op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), root))
    if attn_mask.dtype == ir.DataType.BOOL:
        hidden, bias = op.Not(attn_mask), op.Where(attn_mask, number(0), number(query.dtype.min))
    else:
        hidden, bias = op.Equal(attn_mask, number(-math.inf)), attn_mask
    weights = op.Where(hidden, number(0), op.Softmax(op.Add(scores, bias), axis=-1))
    if dropout_p != 0:
        weights, _ = op.Dropout(weights, dropout_p)
    return op.MatMul(weights, value)


def repeated(x: Any, times: int) -> Any:
    """Heads of keys or values, each as many times in a row as there are queries for it; (B, H, M, D) all along."""
    op = operators()
    spread = op.Expand(op.Unsqueeze(x, op.Constant(value_ints=[2])), op.Constant(value_ints=[1, 1, times, 1, 1]))
    return op.Reshape(spread, op.Constant(value_ints=[0, x.shape[1] * times, -1, x.shape[3]]))


def may_hide_a_row(mask: Any) -> bool:
    """Whether a boolean mask, or a float one with an infinity behind it, could hide everything from a row."""
    if mask.dtype == ir.DataType.BOOL:
        known = mask.const_value
        return known is None or not known.numpy().any(axis=-1).all()
    near: list[ir.Value | None] = [mask]
    seen: set[ir.Value] = set()
    while near and len(seen) < REACH:
        value = near.pop(0)
        if value is None or value in seen:
            continue
        seen.add(value)
        if infinite(value):
            return True
        node = value.producer()
        near += [] if node is None else node.inputs
    return False


def infinite(value: ir.Value) -> bool:
    """Whether a constant holds a negative infinity."""
    known: Any = value.const_value
    node = value.producer()
    if known is None and node is not None and node.op_type in ("Constant", "ConstantOfShape"):
        held = next(iter(node.attributes.values()), None)
        known = None if held is None else held.value
    if known is None or isinstance(known, str):
        return False
    array = np.asarray(known.numpy() if hasattr(known, "numpy") else known)
    return array.dtype.kind not in "biuSUO" and bool(np.isneginf(array.astype(np.float64)).any())
