"""Post-training W8A8: weights and activations of linear layers in 8 bits, scales from calibration data.

Sources: Jacob et al. 2018, arXiv:1712.05877 (integer arithmetic); Wu et al. 2020, arXiv:2004.09602 (per-channel
weights, max, percentile and MSE calibration). The plan says what precision each layer gets; how it is computed
(static pairs, or dynamic) is each target's affair.

Shapes: R rows (all leading dimensions together), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from passes.contract import Context, Pass, Plan
from passes.quantization.linear import QuantizedLinear
from passes.quantization.scales import arithmetic, scale_of, some_rows, unusable
from passes.selection import check_patterns, excluded_by


class QuantizeInt8(Pass):
    """Replace linear layers by their 8-bit form: symmetric, weights per output channel, activations per tensor."""

    needs_calibration: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("quantize_int8",)

    observer: Literal["max", "percentile", "mse"] = Field(
        "max", description="how an activation's scale is chosen: largest value, a percentile, or least squared error"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="percentile of magnitudes, for observer=percentile")
    exclude: tuple[str, ...] = Field((), description="glob patterns of module paths that stay as they are")
    smallest: int = Field(1024, ge=0, description="layers with fewer weights than this stay as they are")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose a scale for each layer's input, and find where a CPU's 16-bit sums would saturate."""
        layers: dict[str, nn.Linear] = {}
        skipped: dict[str, str] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                if reason := self.reason_to_skip(path, module):
                    skipped[path] = reason
                else:
                    layers[path] = module
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
                skipped[path] = f"{type(module).__name__}: only linear layers are quantized"
        check_patterns(self.exclude, [*layers, *skipped], what="linear layer")
        seen = record_inputs(model, layers, context)
        choice = {}
        for number, (path, layer) in enumerate(layers.items()):
            context.say(number, len(layers), f"choosing scales: {path}")
            if path not in seen:
                skipped[path] = "never called on the calibration inputs"
            elif reason := unusable(seen[path]):
                skipped[path] = reason
            else:
                choice[path] = {
                    "precision": "int8",
                    "input_scale": scale_of(seen[path], observer=self.observer, percentile=self.percentile),
                    **arithmetic(seen[path], layer.weight),
                }
        return Plan(choice=choice, skipped=skipped, facts={"calibration_calls": len(context.calibration)})

    def reason_to_skip(self, path: str, layer: nn.Linear) -> str:
        """Why a linear layer stays as it is; empty when it does not."""
        if reason := excluded_by(path, self.exclude):
            return reason
        if layer.weight.numel() < self.smallest:
            return f"has {layer.weight.numel()} weights, fewer than {self.smallest}"
        return ""

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Put a ``QuantizedLinear`` in the place of each planned layer."""
        for path, decision in plan.choice.items():
            parent, _, name = path.rpartition(".")
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear), f"{path} is no linear layer any more"
            setattr(model.get_submodule(parent), name, QuantizedLinear(layer, decision["input_scale"]))
        return model


def record_inputs(model: nn.Module, layers: Mapping[str, nn.Linear], context: Context) -> dict[str, Tensor]:
    """Evenly spaced rows of each layer's inputs over the calibration calls, and always the row of the largest value."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for path, layer in layers.items():

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
            seen.setdefault(path, []).append(some_rows(inputs[0].detach().flatten(0, -2).float()))

        hooks.append(layer.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            for number, inputs in enumerate(context.calibration):
                context.say(number, len(context.calibration), "calibrating")
                model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(rows) for path, rows in seen.items()}
