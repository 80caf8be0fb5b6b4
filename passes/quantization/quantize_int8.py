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
from passes.quantization.linear import QMAX, QMIN, QuantizedLinear, weight_scales
from passes.selection import check_patterns, excluded_by

ROWS = 256
"""Rows of a layer's input kept from each calibration call, enough to choose a scale by."""

ROWS_ABOVE, ROWS_GAIN = 0.01, 0.7
"""A scale for each row takes time, so a layer is marked for it where its relative error with one scale is above the
first, and with one for each row below the second times that."""


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
            elif not torch.isfinite(seen[path]).all():
                skipped[path] = "its input is not finite on the calibration inputs"
            elif float(seen[path].abs().max()) == 0:
                skipped[path] = "its input is zero on the calibration inputs"
            else:
                choice[path] = self.choose(seen[path], layer.weight)
        return Plan(choice=choice, skipped=skipped, facts={"calibration_calls": len(context.calibration)})

    def reason_to_skip(self, path: str, layer: nn.Linear) -> str:
        """Why a linear layer stays as it is; empty when it does not."""
        if reason := excluded_by(path, self.exclude):
            return reason
        if layer.weight.numel() < self.smallest:
            return f"has {layer.weight.numel()} weights, fewer than {self.smallest}"
        return ""

    def choose(self, x: Tensor, weight: Tensor) -> dict[str, float | bool | str]:
        """The scale of input x (R, K) under weight (N, K), rounded to 6 digits, and whether 16-bit sums saturate."""
        magnitude = x.abs()
        if self.observer == "max":
            limit = float(magnitude.max())
        elif self.observer == "percentile":
            limit = float(torch.quantile(magnitude.flatten()[: 1 << 23], self.percentile / 100)) or float(
                magnitude.max()
            )
        else:
            limit = least_squares_limit(x)
        whole, by_row = dynamic_error(x, weight, rows=False), dynamic_error(x, weight, rows=True)
        rows = whole > ROWS_ABOVE and by_row < ROWS_GAIN * whole
        full, reduced, share = saturation(x, weight, by_row=rows)
        return {
            "precision": "int8",
            "input_scale": float(f"{limit / QMAX:.6g}"),
            "rows": rows,
            "saturating_share": float(f"{share:.3g}"),
            "reduced_range": full > reduced,
        }

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
            rows = inputs[0].detach().flatten(0, -2).float()  # (R, K)
            spaced = rows[:: max(1, len(rows) // ROWS)]
            largest = rows[rows.abs().amax(dim=1).argmax()][None]
            seen.setdefault(path, []).append(torch.cat([spaced, largest]))

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


def least_squares_limit(x: Tensor) -> float:
    """The clipping limit with the least squared rounding and clipping error of x, among 40 shares of its maximum."""
    largest = float(x.abs().max())

    def error(limit: float) -> float:
        scale = limit / QMAX
        return float(((x / scale).round().clamp(QMIN, QMAX) * scale - x).square().sum())

    return min((largest * share / 40 for share in range(40, 0, -1)), key=error)


def as_bytes(x: Tensor, *, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """X (R, K) as DynamicQuantizeLinear makes it 0 .. 255, with one scale, or one for each row; the scale and zero."""
    low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)  # (R, 1)
    if not by_row:
        low, high = low.min().clamp(max=0), high.max().clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-14)
    zero = -low / step if by_row else (-low / step).round()
    return (x / step + zero).round().clamp(0, 255), step, zero


def dynamic_error(x: Tensor, weight: Tensor, *, rows: bool) -> float:
    """Relative error of x (R, K) times weight (N, K) when x is made 8 bits with one scale, or one for each row."""
    weight = weight.detach().float()
    q, step, zero = as_bytes(x, by_row=rows)
    exact = x @ weight.T
    return float((((q - zero) * step) @ weight.T - exact).norm() / exact.norm().clamp(min=1e-12))


def saturation(x: Tensor, weight: Tensor, rows: int = 32, *, by_row: bool = False) -> tuple[float, float, float]:
    """What 16-bit sums of neighbours do to x (R, K) times weight (N, K), by simulating them exactly.

    x86 without VNNI multiplies unsigned by signed bytes and adds neighbours k and k+1 in 16 saturating bits.

    Returns:
        Relative error of the product with 8-bit weights as that processor computes it, with 7-bit weights (where
        nothing can saturate), and the share of sums that saturate.
    """
    x = x[torch.linspace(0, len(x) - 1, min(rows, len(x))).long()]
    weight = weight.detach().float()
    exact = x @ weight.T  # (R, N)
    q, step, zero = as_bytes(x, by_row=by_row)  # (R, K)
    if x.shape[1] % 2:
        q, weight = nn.functional.pad(q, (0, 1)), nn.functional.pad(weight, (0, 1))
    norm = float(exact.norm()) or 1.0

    scale = weight_scales(weight)  # (N,)
    w = (weight / scale[:, None]).round()  # (N, K)
    product, clipped = torch.zeros_like(exact), 0
    for start in range(0, q.shape[1], 64):
        left, right = q[:, start : start + 64], w[:, start : start + 64]
        terms = left[:, None, :] * right[None]  # (R, N, 64)
        sums = terms[..., 0::2] + terms[..., 1::2]
        held = sums.clamp(-32768, 32767)
        clipped += int((sums != held).sum())
        product += held.sum(dim=2)
    product = (product - zero * w.sum(dim=1)) * step * scale
    halves = (w / 2).round()
    reduced = (q @ halves.T - zero * halves.sum(dim=1)) * step * scale * 2
    pairs = x.shape[0] * x.shape[1] // 2 * weight.shape[0]
    return float((product - exact).norm()) / norm, float((reduced - exact).norm()) / norm, clipped / pairs
