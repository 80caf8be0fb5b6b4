"""Weights in few bits with a scale for each block of inputs, and a linear layer that holds them.

Shapes: K inputs, N outputs, B inputs that share a scale (a block).

Formats: ``int4`` and ``int8`` are symmetric integers with float scales. ``nvfp4`` is E2M1 with an E4M3 scale for each
block of 16 and one float scale for all (NVIDIA's NVFP4). ``mxfp8`` is E4M3 in blocks of 32 with scales that are powers
of two (OCP Microscaling Formats 1.0, sections 5.1 and 6.3, rounded up so that nothing is clipped); the scales are
written as floats, because TensorRT-RTX reads no initializer of type E8M0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from enginewright.passes.quantization.linear import ops
from enginewright.passes.quantization.pairs import FLOAT4, FP8_LARGEST, INT4, from_codes

Weights = Literal["int4", "int8", "nvfp4", "mxfp8"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes that a 4-bit float has."""


@dataclass(frozen=True)
class Format:
    """How weights are written.

    Args:
        largest: magnitude that a code has.
        bits: of a code in the graph's file.
        opset: first ONNX operator set that knows it.
        onnx_type: 4-bit type in the graph, as PyTorch holds a byte for each code; 0: as PyTorch holds it.
        block: the only block size that it knows; 0: any.
    """

    largest: float
    bits: int
    opset: int
    onnx_type: int = 0
    block: int = 0


FORMATS: dict[Weights, Format] = {
    "int4": Format(largest=7, bits=4, opset=21, onnx_type=INT4),
    "int8": Format(largest=127, bits=8, opset=21),
    "nvfp4": Format(largest=6, bits=4, opset=23, onnx_type=FLOAT4, block=16),
    "mxfp8": Format(largest=FP8_LARGEST, bits=8, opset=21, block=32),
}


class Blocks(NamedTuple):
    """Codes (K, N), their scales (K/B, N), and for nvfp4 the scale of these scales ()."""

    codes: Tensor
    scales: Tensor
    scale: Tensor | None

    def float_scales(self) -> Tensor:
        """Scales (K/B, N) as numbers."""
        return self.scales if self.scale is None else self.scales.float() * self.scale

    def values(self) -> Tensor:
        """What the codes stand for: (K, N)."""
        scales = self.float_scales()
        return from_codes(self.codes, scales, block=len(self.codes) // len(scales))


def round_to(x: Tensor, weights: Weights) -> Tensor:
    """The nearest codes of a format, as floats; ties to even."""
    if weights in ("int4", "int8"):
        return x.round().clamp(-FORMATS[weights].largest, FORMATS[weights].largest)
    if weights == "mxfp8":
        return x.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).to(x.dtype)
    # Steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6.
    magnitude = x.abs().clamp(max=6)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    return (magnitude / step).round() * step * x.sign()


def block_scales(weight: Tensor, weights: Weights, block: int) -> tuple[Tensor, Tensor | None]:
    """Scales (K/B, N) by which no weight (K, N) is clipped, and for nvfp4 the scale of the scales."""
    largest = weight.unflatten(0, (-1, block)).abs().amax(dim=1) / FORMATS[weights].largest  # (K/B, N)
    if weights == "mxfp8":
        return torch.where(largest > 0, torch.exp2(largest.log2().ceil()), torch.ones_like(largest)), None
    if weights == "nvfp4":
        scale = (largest.max() / FP8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        return (largest / scale).to(torch.float8_e4m3fn), scale
    return torch.where(largest > 0, largest, torch.ones_like(largest)), None


def in_blocks(weight: Tensor, weights: Weights, block: int) -> Blocks:
    """Round a weight (K, N) to nearest."""
    scales, scale = block_scales(weight, weights, block)
    return with_scales(weight, weights, Blocks(torch.empty(0), scales, scale))


def with_scales(weight: Tensor, weights: Weights, like: Blocks) -> Blocks:
    """Round a weight (K, N) to nearest, with scales that are there."""
    wide = like.float_scales().repeat_interleave(len(weight) // len(like.scales), dim=0)
    rounded = round_to(torch.where(wide > 0, weight / wide, torch.zeros_like(weight)), weights)
    return Blocks(as_codes(rounded, weights), like.scales, like.scale)


def as_codes(rounded: Tensor, weights: Weights) -> Tensor:
    """Codes in the type that holds them: int8 for integers, E4M3 for floats (which has every E2M1 value)."""
    return rounded.to(torch.int8 if weights in ("int4", "int8") else torch.float8_e4m3fn).contiguous()


class BlockLinear(nn.Module):
    """``y = x W + b`` with W in blocks, and x in 8 bits where an ``input_scale`` is given.

    PyTorch holds a byte for each 4-bit code; the graph's file holds two codes in a byte.

    Args:
        blocks: W (K, N).
        weights: their format.
        bias: (N,) or None.
        inverse: what x is multiplied by first, (K,); see ``smoothing``.
        input_scale: of x in int8; None: x stays as it is.
    """

    weight: Tensor
    scales: Tensor
    scale: Tensor | None
    inverse: Tensor | None

    def __init__(
        self,
        blocks: Blocks,
        weights: Weights,
        bias: Tensor | None,
        inverse: Tensor | None = None,
        input_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = blocks.codes.shape
        self.block = self.in_features // len(blocks.scales)
        self.onnx_opset, self.weight_bits = FORMATS[weights].opset, FORMATS[weights].bits
        self.onnx_type = FORMATS[weights].onnx_type
        self.input_scale = input_scale
        self.register_buffer("weight", blocks.codes)
        self.register_buffer("scales", blocks.scales)
        self.register_buffer("scale", blocks.scale)
        self.register_buffer("inverse", inverse)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        if self.inverse is not None:
            x = x * self.inverse
        leading = x.shape[:-1]
        if self.input_scale is not None:
            x = x.flatten(0, -2)  # TensorRT-RTX 1.7 builds pairs on both sides with blocks for plain matrices only
            q = ops.quantize_per_tensor(x, self.input_scale, 0, -128, 127, torch.int8)
            x = ops.dequantize_per_tensor(q, self.input_scale, 0, -128, 127, torch.int8)
        scales = self.scales if self.scale is None else from_codes(self.scales, self.scale)
        y = torch.matmul(x, from_codes(self.weight, scales, block=self.block, packed=self.onnx_type))
        y = y if self.bias is None else y + self.bias
        return y if self.input_scale is None else y.view(*leading, -1)
