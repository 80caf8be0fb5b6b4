"""Post-training W8A8: weights and activations of linear layers in 8 bits, scales from calibration data.

Sources: Jacob et al. 2018, arXiv:1712.05877 (integer arithmetic); Wu et al. 2020, arXiv:2004.09602 (per-channel
weights, max, percentile and MSE calibration); Xiao et al. 2022, arXiv:2211.10438 (``smooth``). The plan says what
precision each layer gets; how it is computed (static pairs, or dynamic) is each target's affair.

Shapes: R rows (all leading dimensions together), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from enginewright.ground.facts import FLOAT_WEIGHTS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.scales import CalibrationFacts, Int8Product, arithmetic, scale_of
from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.quantization.grouping import Chosen, DividedNorm, QuantizedLayer, plan_groups, rewrite_layers
from enginewright.passes.quantization.linear import QuantizedLinear
from enginewright.passes.quantization.reading import linear_layers
from enginewright.passes.quantization.smoothing import multiplied, shared_factors


class Int8Layer(QuantizedLayer, Int8Product):
    """How a linear layer is computed in 8 bits."""


class QuantizeInt8(Pass):
    """Replace linear layers by their 8-bit form: symmetric, weights per output channel, activations per tensor."""

    needs_calibration: ClassVar[bool] = True
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    destroys: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS,)
    looks_for: ClassVar[str] = "linear layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (Int8Layer, DividedNorm)
    facts: ClassVar[type[Facts]] = CalibrationFacts

    observer: Literal["max", "percentile", "mse"] = Field(
        "max", description="how an activation's scale is chosen: largest value, a percentile, or least squared error"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="percentile of magnitudes, for observer=percentile")
    exclude: tuple[str, ...] = Field((), description="glob patterns of module paths that stay as they are")
    smallest: int = Field(1024, ge=0, description="layers with fewer weights than this stay as they are")
    smooth: float = Field(
        0, ge=0, le=1, description="how much of the inputs' outlying channels moves into the weights first; 0: none"
    )

    @property
    def formats(self) -> tuple[str, ...]:
        """What it writes."""
        return ("int8",)

    def plan(self, model: nn.Module, context: Context) -> Plan[Int8Layer | DividedNorm]:
        """Choose a scale for each layer's input, and find where a CPU's 16-bit sums would saturate."""
        layers, skipped = linear_layers(model, exclude=self.exclude, smallest=self.smallest)
        histogram = self.observer == "percentile" and not self.smooth
        return plan_groups(model, layers, skipped, context, self.choose, histogram=histogram)

    def choose(self, layers: Mapping[str, nn.Linear], seen: Mapping[str, InputStatistics]) -> Chosen[Int8Layer]:
        """Decide for layers that read the same."""
        s = shared_factors(layers.values(), seen.values(), self.smooth)
        decisions = {}
        for path, layer in layers.items():
            x = seen[path].rows() if s is None else seen[path].rows() / s
            decisions[path] = Int8Layer(
                precision="int8",
                input_scale=scale_of(seen[path], observer=self.observer, percentile=self.percentile, s=s),
                **arithmetic(x, multiplied(layer, s).weight),
            )
        return Chosen(decisions, s)

    def rewrite(self, model: nn.Module, plan: Plan[Int8Layer | DividedNorm]) -> nn.Module:
        """Put a ``QuantizedLinear`` in the place of each planned layer, and divide the norms that smooth."""
        return rewrite_layers(
            model, plan, lambda _, layer, decision, inverse: QuantizedLinear(layer, decision.input_scale, inverse)
        )
