"""A linear layer in 8 bits, in a form that computes in PyTorch and exports as standard QuantizeLinear pairs.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from enginewright.passes.kernel.rounding import QMAX, QMIN, weight_scales

ops = torch.ops.quantized_decomposed


class QuantizedLinear(nn.Module):
    """``y = x W + b`` with x and W rounded to int8 and multiplied back.

    The weight is held as int8, transposed to (K, N), so that the graph has a plain product with per-column scales.

    Args:
        linear: the layer.
        input_scale: of x.
        inverse: what x (..., K) is multiplied by first, (K,); see ``smoothing``.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    inverse: Tensor | None

    def __init__(self, linear: nn.Linear, input_scale: float, inverse: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.input_scale = input_scale
        with torch.no_grad():
            scale = weight_scales(linear.weight.float())
            rounded = (linear.weight.float() / scale[:, None]).round().clamp(QMIN, QMAX)
        self.register_buffer("weight", rounded.to(torch.int8).T.contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(self.out_features, dtype=torch.int8))
        self.register_buffer("inverse", inverse)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        if self.inverse is not None:
            x = x * self.inverse
        q = ops.quantize_per_tensor(x, self.input_scale, 0, -128, QMAX, torch.int8)
        x = ops.dequantize_per_tensor(q, self.input_scale, 0, -128, QMAX, torch.int8)
        weight = ops.dequantize_per_channel(
            self.weight, self.weight_scale, self.weight_zero, 1, -128, QMAX, torch.int8
        )  # (K, N)
        y = torch.matmul(x, weight)
        return y if self.bias is None else y + self.bias
