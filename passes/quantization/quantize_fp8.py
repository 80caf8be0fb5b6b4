"""Post-training W8A8 in 8-bit floats (E4M3): linear layers, scales from calibration data.

Source: Micikevicius et al. 2022, arXiv:2209.05433, sections 3 and 4.2 (E4M3 for weights and activations, one scale
for each tensor). Departure: weights have a scale for each output channel.

Shapes: R rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from enginewright.ground.facts import FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.scales import CalibrationFacts, scale_of
from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.quantization.fp8 import Fp8Linear
from enginewright.passes.quantization.grouping import Chosen, DividedNorm, QuantizedLayer, plan_groups, rewrite_layers
from enginewright.passes.quantization.pairs import FP8_LARGEST
from enginewright.passes.quantization.reading import linear_layers


class Fp8Layer(QuantizedLayer):
    """How a linear layer is computed in 8-bit floats."""

    precision: Literal["fp8"] = Field(description="numbers of the weights and of the input")
    input_scale: float = Field(description="of the input")


class QuantizeFp8(Pass):
    """Replace linear layers by their 8-bit float form: weights per output channel, activations per tensor."""

    needs_calibration: ClassVar[bool] = True
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    destroys: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    looks_for: ClassVar[str] = "linear layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (Fp8Layer,)
    facts: ClassVar[type[Facts]] = CalibrationFacts

    observer: Literal["max", "percentile"] = Field(
        "max", description="how an activation's scale is chosen: largest value, or a percentile"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="percentile of magnitudes, for observer=percentile")
    exclude: tuple[str, ...] = Field((), description="glob patterns of module paths that stay as they are")
    smallest: int = Field(1024, ge=0, description="layers with fewer weights than this stay as they are")

    @property
    def formats(self) -> tuple[str, ...]:
        """What it writes."""
        return ("fp8",)

    def plan(self, model: nn.Module, context: Context) -> Plan[Fp8Layer | DividedNorm]:
        """Choose a scale for each layer's input."""
        layers, skipped = linear_layers(model, exclude=self.exclude, smallest=self.smallest)
        histogram = self.observer == "percentile"
        return plan_groups(model, layers, skipped, context, self.choose, histogram=histogram)

    def choose(self, layers: Mapping[str, nn.Linear], seen: Mapping[str, InputStatistics]) -> Chosen[Fp8Layer]:
        """Decide for layers that read the same."""
        return Chosen({path: Fp8Layer(precision="fp8", input_scale=self.scale(seen[path])) for path in layers})

    def scale(self, seen: InputStatistics) -> float:
        """The scale of an input."""
        return scale_of(seen, observer=self.observer, percentile=self.percentile, largest=FP8_LARGEST)

    def rewrite(self, model: nn.Module, plan: Plan[Fp8Layer | DividedNorm]) -> nn.Module:
        """Put an ``Fp8Linear`` in the place of each planned layer."""
        return rewrite_layers(model, plan, lambda _, layer, decision, __: Fp8Linear(layer, decision.input_scale))
