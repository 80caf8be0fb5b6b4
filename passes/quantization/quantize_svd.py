"""SVDQuant: a small branch in floats takes what is hard to round, and the rest is rounded to 4 or 8 bits.

Source: Li et al. 2024, arXiv:2411.05007, section 4.2, equations 4 to 7: outlying inputs are first moved into the weight
(x W = (x / s)(s W)), then the first ``rank`` singular directions of s W become a branch of their own and the
residual is quantized. Departures: s is SmoothQuant's with one strength for all layers, where the paper searches it
layer by layer; the residual of 4 bits has float scales for blocks of inputs.

Shapes: R rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.facts import FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.scales import CalibrationFacts, scale_of
from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.kernel.surgery import linear_like
from enginewright.passes.quantization.blocks import BlockLinear, in_blocks
from enginewright.passes.quantization.grouping import Chosen, DividedNorm, QuantizedLayer, plan_groups, rewrite_layers
from enginewright.passes.quantization.linear import QuantizedLinear
from enginewright.passes.quantization.reading import linear_layers
from enginewright.passes.quantization.smoothing import multiplied, shared_factors


class SplitLayer(QuantizedLayer):
    """How a linear layer is split into a branch in floats and a rounded residual."""

    arrays: ClassVar[Mapping[str, str]] = {
        **QuantizedLayer.arrays,
        ".down": "the branch's first factor (rank, K)",
        ".up": "its second factor (N, rank)",
    }

    precision: Literal["int4", "int8"] = Field(description="numbers of the residual")
    rank: int = Field(description="singular directions in the branch")
    block: int = Field(description="inputs of the residual that share a scale, in int4")
    input_scale: float | None = Field(None, description="of the residual's input, where that is in 8 bits")


class QuantizeSvd(Pass):
    """Split each linear layer into a low-rank branch in floats and a rounded residual."""

    needs_calibration: ClassVar[bool] = True
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    destroys: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    looks_for: ClassVar[str] = "linear layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (SplitLayer, DividedNorm)
    facts: ClassVar[type[Facts]] = CalibrationFacts

    rank: int = Field(32, ge=1, description="singular directions that stay in floats, at most a quarter of all")
    residual: Literal["int4", "int8"] = Field(
        "int4", description="int4: in blocks of inputs; int8: a scale for each output channel, and int8 activations"
    )
    activations: Literal["none", "int8"] = Field("int8", description="what a residual in int4 is multiplied by")
    block: int = Field(32, ge=16, multiple_of=16, description="inputs that share a scale in int4")
    smooth: float = Field(0.5, ge=0, le=1, description="how much of the outlying inputs moves into the weights first")
    exclude: tuple[str, ...] = Field((), description="glob patterns of module paths that stay as they are")
    smallest: int = Field(1024, ge=0, description="layers with fewer weights than this stay as they are")

    @property
    def formats(self) -> tuple[str, ...]:
        """What it writes."""
        if self.residual == "int8":
            return ("int8",)
        return ("int4_int8" if self.activations == "int8" else "int4_weights",)

    def plan(self, model: nn.Module, context: Context) -> Plan[SplitLayer | DividedNorm]:
        """Smooth, decompose, and choose a scale for each layer's input."""
        layers, skipped = linear_layers(model, exclude=self.exclude, smallest=self.smallest, fits=self.reason_to_skip)
        return plan_groups(model, layers, skipped, context, self.choose)

    def reason_to_skip(self, layer: nn.Linear) -> str:
        """Why a layer cannot be cut into blocks; empty when it can."""
        if self.residual == "int4" and layer.in_features % self.block:
            return f"its {layer.in_features} inputs are no multiple of the block of {self.block}"
        return ""

    def choose(self, layers: Mapping[str, nn.Linear], seen: Mapping[str, InputStatistics]) -> Chosen[SplitLayer]:
        """Decide for layers that read the same."""
        s = shared_factors(layers.values(), seen.values(), self.smooth)
        decisions: dict[str, SplitLayer] = {}
        arrays: dict[str, Tensor] = {}
        for path, layer in layers.items():
            rank = max(1, min(self.rank, min(layer.weight.shape) // 4))
            scales = {}
            if self.residual == "int8" or self.activations == "int8":
                scales["input_scale"] = scale_of(seen[path], observer="max", percentile=100, s=s)
            decisions[path] = SplitLayer(precision=self.residual, rank=rank, block=self.block, **scales)
            down, up = largest_directions(multiplied(layer, s).weight, rank)
            arrays |= {f"{path}.down": down, f"{path}.up": up}
        return Chosen(decisions, s, arrays)

    def rewrite(self, model: nn.Module, plan: Plan[SplitLayer | DividedNorm]) -> nn.Module:
        """Put a ``BranchedLinear`` in the place of each planned layer, and divide the norms that smooth."""

        def build(path: str, layer: nn.Linear, decision: SplitLayer, inverse: Tensor | None) -> nn.Module:
            down, up = plan.array(f"{path}.down"), plan.array(f"{path}.up")
            rest = layer.weight.detach().float() - up @ down
            scale = decision.input_scale
            if decision.precision == "int8":
                assert scale is not None
                return BranchedLinear(down, up, QuantizedLinear(linear_like(layer, rest, layer.bias), scale), inverse)
            blocks = in_blocks(rest.T, "int4", decision.block)
            return BranchedLinear(down, up, BlockLinear(blocks, "int4", layer.bias, input_scale=scale), inverse)

        return rewrite_layers(model, plan, build)


def largest_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of this rank to a weight (N, K), as down (rank, K) and up (N, rank)."""
    u, sizes, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = sizes[:rank].sqrt()
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()


class BranchedLinear(nn.Module):
    """``y = x down^T up^T + residual(x)``, with x (..., K) multiplied by ``inverse`` (K,) first where there is one."""

    down: Tensor
    up: Tensor
    inverse: Tensor | None

    def __init__(self, down: Tensor, up: Tensor, residual: nn.Module, inverse: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = down.shape[1], up.shape[0]
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.residual = residual
        self.register_buffer("inverse", inverse)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        if self.inverse is not None:
            x = x * self.inverse
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up) + self.residual(x)
