"""Weights of linear layers in 4 or 8 bits with a scale for each block of inputs; activations in floats, or in int8.

Sources: Frantar et al. 2022, arXiv:2210.17323 (``gptq``); Lin et al. 2023, arXiv:2306.00978 (``awq``). ``rtn`` rounds
each weight to nearest. NVFP4 and MXFP8 here are weights alone: their activations need scales that are measured at
each call, for which ONNX has no standard operator.

Shapes: R rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.scales import CalibrationFacts, scale_of
from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.quantization.awq import awq_factors
from enginewright.passes.quantization.blocks import FORMATS, BlockLinear, Blocks, Weights, in_blocks
from enginewright.passes.quantization.gptq import gptq
from enginewright.passes.quantization.grouping import Chosen, DividedNorm, QuantizedLayer, plan_groups, rewrite_layers
from enginewright.passes.quantization.reading import linear_layers

Algorithm = Literal["rtn", "awq", "gptq"]


class RoundedLayer(QuantizedLayer):
    """How the weights of a linear layer are rounded in blocks."""

    arrays: ClassVar[Mapping[str, str]] = {
        **QuantizedLayer.arrays,
        ".codes": "rounded weights (K, N), where data chose them",
        ".scales": "their scales (K/B, N)",
        ".scale": "the scale of nvfp4's scales",
    }

    precision: Weights = Field(description="format of the weights")
    block: int = Field(description="inputs that share a scale")
    algorithm: Algorithm = Field(description="how the codes were chosen")
    input_scale: float | None = Field(None, description="of the input, where that is in 8 bits")


class QuantizeWeights(Pass):
    """Replace linear layers by ones whose weights are rounded in blocks."""

    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    destroys: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    looks_for: ClassVar[str] = "linear layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (RoundedLayer, DividedNorm)
    facts: ClassVar[type[Facts]] = CalibrationFacts

    weights: Weights = Field("int4", description="format of the weights")
    algorithm: Algorithm = Field(
        "rtn", description="round to nearest; with inputs that matter enlarged first; or making up for each error"
    )
    block: int = Field(0, ge=0, description="inputs that share a scale, a power of two; 0: 16 for nvfp4, else 32")
    activations: Literal["none", "int8", "fp4", "fp8"] = Field(
        "none", description="none: floats; int8: with a scale from calibration, beside int4 weights"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of module paths that stay as they are")
    smallest: int = Field(1024, ge=0, description="layers with fewer weights than this stay as they are")

    def model_post_init(self, context: Any) -> None:
        """Refuse what no graph can hold, with the reason."""
        del context
        key, reason = self.refusal()
        if reason:
            raise ToolchainError(f"{self.name()}: {key} is {getattr(self, key)!r}; {reason}", where=key)

    def refusal(self) -> tuple[str, str]:
        """The parameter that does not go with the others, and why; empty when all do."""
        only = FORMATS[self.weights].block
        if self.size & (self.size - 1) or self.size < 16:
            return "block", "it must be a power of two, and 16 or more"
        if only and self.size != only:
            return "block", f"{self.weights} has blocks of {only}"
        if self.activations in ("fp4", "fp8"):
            return "activations", (
                "in blocks their scales must be measured at each call, for which ONNX has no standard operator; "
                "quantize_fp8 takes whole tensors in 8-bit floats"
            )
        if self.activations == "int8" and self.weights != "int4":
            return (
                "activations",
                f"beside {self.weights} weights it is refused: quantize_int8 has 8 bits on both sides",
            )
        return "", ""

    @property
    def size(self) -> int:
        """How many inputs of a layer share one scale."""
        return self.block or FORMATS[self.weights].block or 32

    @property
    def formats(self) -> tuple[str, ...]:
        """What it writes."""
        return ("int4_int8" if self.activations == "int8" else f"{self.weights}_weights",)

    def plan(self, model: nn.Module, context: Context) -> Plan[RoundedLayer | DividedNorm]:
        """Choose what is to be rounded, and what rounding cannot find again without data.

        Raises ``ToolchainError`` without calibration inputs where these are needed, and for an ``exclude`` pattern that
        matches nothing.
        """
        layers, skipped = linear_layers(model, exclude=self.exclude, smallest=self.smallest, fits=self.reason_to_skip)
        if self.algorithm == "rtn" and self.activations == "none":
            return Plan(choice={path: self.decision() for path in layers}, skipped=skipped)
        asked = f"algorithm {self.algorithm!r}" if self.algorithm != "rtn" else "activations 'int8'"
        self.check_calibration(context, asked, otherwise="take algorithm = 'rtn' and activations = 'none'")
        products = self.algorithm == "gptq"
        return plan_groups(model, layers, skipped, context, self.choose, products=products)

    def reason_to_skip(self, layer: nn.Linear) -> str:
        """Why a layer cannot be cut into blocks; empty when it can."""
        if layer.in_features % self.size:
            return f"its {layer.in_features} inputs are no multiple of the block of {self.size}"
        return ""

    def decision(self, **scales: float) -> RoundedLayer:
        """What the plan says of a layer."""
        return RoundedLayer(precision=self.weights, block=self.size, algorithm=self.algorithm, **scales)

    def choose(self, layers: Mapping[str, nn.Linear], seen: Mapping[str, InputStatistics]) -> Chosen[RoundedLayer]:
        """Decide for layers that read the same."""
        s = None
        if self.algorithm == "awq":
            matrices = [layer.weight.detach().float().T for layer in layers.values()]
            s = awq_factors(matrices, list(seen.values()), self.weights, self.size)
        decisions: dict[str, RoundedLayer] = {}
        arrays: dict[str, Tensor] = {}
        for path, layer in layers.items():
            scales = {}
            if self.activations == "int8":
                scales["input_scale"] = scale_of(seen[path], observer="max", percentile=100, s=s)
            decisions[path] = self.decision(**scales)
            if self.algorithm == "gptq":
                found = gptq(layer.weight.detach().float().T, seen[path].products, self.weights, self.size)
                arrays |= as_arrays(path, found)
        return Chosen(decisions, s, arrays)

    def rewrite(self, model: nn.Module, plan: Plan[RoundedLayer | DividedNorm]) -> nn.Module:
        """Put a ``BlockLinear`` in the place of each planned layer, and divide the norms that smooth."""

        def build(path: str, layer: nn.Linear, decision: RoundedLayer, inverse: Tensor | None) -> nn.Module:
            if decision.algorithm == "gptq":
                blocks = from_arrays(path, plan)
            else:
                blocks = in_blocks(layer.weight.detach().float().T, decision.precision, decision.block)
            return BlockLinear(blocks, decision.precision, layer.bias, inverse, decision.input_scale)

        return rewrite_layers(model, plan, build)


def as_arrays(path: str, blocks: Blocks) -> dict[str, Tensor]:
    """Rounded weights as arrays of a plan."""
    found = {f"{path}.codes": blocks.codes, f"{path}.scales": blocks.scales}
    return found if blocks.scale is None else {**found, f"{path}.scale": blocks.scale}


def from_arrays(path: str, plan: Plan) -> Blocks:
    """Rounded weights from a plan's arrays."""
    return Blocks(plan.array(f"{path}.codes"), plan.array(f"{path}.scales"), plan.arrays.get(f"{path}.scale"))
