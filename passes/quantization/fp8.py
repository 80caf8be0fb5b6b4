"""A linear layer in 8-bit floats (E4M3), in a form that exports as standard QuantizeLinear pairs.

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3 (E4M3: largest value 448, no infinity).
Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from enginewright.passes.quantization.pairs import FP8_LARGEST, from_codes, to_fp8


def fp8_scales(weight: Tensor) -> Tensor:
    """Largest magnitude of each output's weights over 448: weight (N, K) -> (N,); 1 where all are zero."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest > 0, largest / FP8_LARGEST, torch.ones_like(largest))


class Fp8Linear(nn.Module):
    """``y = x W + b`` with x and W rounded to E4M3 and multiplied back; W is held as (K, N)."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, input_scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = fp8_scales(weight)
        codes = (weight / scale[:, None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
        self.register_buffer("weight", codes.T.contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", torch.tensor(input_scale))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        x = from_codes(to_fp8(x, self.input_scale), self.input_scale)
        y = torch.matmul(x, from_codes(self.weight, self.weight_scale))
        return y if self.bias is None else y + self.bias
