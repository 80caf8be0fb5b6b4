"""Quantizing and dequantizing that compute in PyTorch and export as standard ONNX operators.

For types and blocks that PyTorch's own operators do not know. While a graph is exported the ONNX operator is named
outright; else the same arithmetic is done here.

Shapes: K inputs, N outputs, B the number of inputs that share a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP8_LARGEST = 448.0
"""Of E4M3, which has no infinity."""

INT4, FLOAT4 = 22, 23
"""ONNX's numbers for int4 and E2M1, which PyTorch lacks."""


def symbolic(
    op: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], like: Tensor, dtype: torch.dtype
) -> Tensor:
    """An ONNX operator whose result has the shape of ``like``."""
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=dtype, shape=like.shape)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in E4M3, clipped to its range, rounded to nearest even."""
    if torch.onnx.is_in_onnx_export():
        zero = torch.zeros((), dtype=torch.float8_e4m3fn)
        return symbolic("QuantizeLinear", (x, scale, zero), {}, x, torch.float8_e4m3fn)
    return (x / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)


def from_codes(codes: Tensor, scale: Tensor, *, block: int = 0, packed: int = 0) -> Tensor:
    """Codes times scales.

    Args:
        codes: any shape; (K, N) with a scale for each column or block.
        scale: of one element, of each column (N,), or of each block (K/B, N).
        block: B; 0 where scales are not in blocks.
        packed: the 4-bit ONNX type that the codes have in the graph; 0: their own.
    """
    if torch.onnx.is_in_onnx_export():
        attributes = {"axis": 0, "block_size": block} if block else {"axis": 1} if scale.ndim else {}
        if packed:
            codes = symbolic("Cast", (codes,), {"to": packed}, codes, codes.dtype)
        # Without a zero point ONNX Runtime 1.32 takes the type for uint8 when it moves the pair past a reshape.
        zero = () if scale.ndim else (torch.zeros((), dtype=codes.dtype),)
        return symbolic("DequantizeLinear", (codes, scale, *zero), attributes, codes, scale.dtype)
    values = codes.to(scale.dtype)
    if not block:
        return values * scale
    return (values.unflatten(0, (-1, block)) * scale[:, None]).flatten(0, 1)
