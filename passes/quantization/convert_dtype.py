"""Compute in fp16 or bf16, but for the layers where that would overflow or lose too much; those are found by running.

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3 (keep what needs range or accuracy in fp32). Here no layer
is kept by its kind: each is run on what it met in calibration, in both types.

Weights are converted where they lie; every layer that owns weights takes its input in its own type, and what is between
layers follows its operands. Buffers (tables of frequencies, running statistics) keep their type.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from passes.contract import Context, Inputs, Pass, Plan
from passes.selection import check_patterns, excluded_by
from passes.surgery import share
from passes.variants import ByTimestep
from toolchain.errors import ToolchainError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

ROUNDS = 8
"""How often a module whose values were not finite is given back to fp32 before the pass gives up."""


class ConvertDtype(Pass):
    """Convert weights and computation to 16 bits, with a list of layers that stay in fp32."""

    needs_calibration: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("convert_dtype", "quantize_*", "search_precision")
    looks_for: ClassVar[str] = "weights in fp32"

    dtype: Literal["float16", "bfloat16"] = Field("float16", description="floating type to compute in")
    headroom: float = Field(2, ge=1, description="a layer stays in fp32 when its values times this would overflow")
    tolerance: float = Field(0.02, gt=0, description="and when its relative L2 error on its own would be above this")
    exclude: tuple[str, ...] = Field((), description="glob patterns of module paths that stay in fp32")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Run the calibration inputs through both types of every layer, then through the whole converted model.

        Raises:
            ToolchainError: the converted model gives values that are not finite whatever is kept.
        """
        owners = {path: module for path, module in model.named_modules() if own_weights(module)}
        check_patterns(self.exclude, owners, what="layer with floating-point weights")
        seen = watch(model, owners, context, DTYPES[self.dtype])
        kept, wide = {}, {}
        limit = torch.finfo(DTYPES[self.dtype]).max / self.headroom
        for path in owners:
            values = seen.get(path)
            if reason := excluded_by(path, self.exclude):
                kept[path] = reason
            elif values and max(values["input"], values["output"]) > limit:
                kept[path] = f"values of {max(values['input'], values['output']):.3g} would overflow"
                wide[path] = values["output"] > limit
            elif values and values["error"] > self.tolerance:
                kept[path] = f"its relative error would be {values['error']:.2g}"
        plan = self.drafted(owners, kept, wide)
        for _ in range(ROUNDS):
            error, faulty = self.tried(model, plan, context)
            if faulty is None:
                return Plan(choice=plan.choice, skipped=kept, facts={**plan.facts, "error": float(f"{error:.6g}")})
            inside = [path for path in owners if path == faulty or path.startswith(f"{faulty}.") or not faulty]
            fresh = [path for path in inside if path not in kept]
            kept |= dict.fromkeys(fresh, f"values within {faulty or 'the model'} were not finite")
            wide |= dict.fromkeys(inside, True)
            plan = self.drafted(owners, kept, wide)
        raise ToolchainError(
            f"in {self.dtype} the model's output is not finite on the calibration inputs",
            where=faulty,
            help="take dtype = 'bfloat16', which has the range of fp32" if self.dtype == "float16" else None,
        )

    def drafted(self, owners: Mapping[str, nn.Module], kept: Mapping[str, str], wide: Mapping[str, bool]) -> Plan:
        """A plan that converts all but the kept layers; the outputs of wide ones stay in fp32 too."""
        choice = {path: {"dtype": self.dtype} for path in owners if path not in kept}
        held = {path: {"wide": bool(wide.get(path))} for path in kept}
        return Plan(choice=choice, skipped=kept, facts={"kept": held})

    def tried(self, model: nn.Module, plan: Plan, context: Context) -> tuple[float, str | None]:
        """The converted model's largest relative error, and the innermost module where values stop being finite.

        Where that module was handed such values already, they arose since the layer before it: that one is named,
        unless its output is in fp32 already; then the module around both is.
        """
        converted = self.rewrite(share(model), plan)
        found: list[str] = []
        before: list[str] = []

        def look(path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if found:
                return
            if finite(result):
                before.extend([path] if own_weights(module) or path in plan.choice else [])
            elif finite([args, kwargs]):
                found.append(path)
            elif before and not plan.facts["kept"].get(before[-1], {}).get("wide"):
                found.append(before[-1])
            else:
                found.append(path.rpartition(".")[0])

        hooks = [
            module.register_forward_hook(partial(look, path), with_kwargs=True)
            for path, module in converted.named_modules()
        ]
        worst = 0.0
        try:
            with torch.no_grad():
                for number, inputs in enumerate(context.calibration):
                    context.say(number, len(context.calibration), f"trying {self.dtype}")
                    got, wanted = vector(converted, inputs), vector(model, inputs)
                    worst = max(worst, float((got - wanted).norm() / wanted.norm().clamp(min=1e-12)))
                    if found:
                        break
        finally:
            for hook in hooks:
                hook.remove()
        return worst, found[0] if found else None

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Convert the weights of each planned layer, and have every layer take its input in its own type."""
        dtype = DTYPES[self.dtype]
        for path in plan.choice:
            module = model.get_submodule(path)
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_floating_point():
                    converted = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                    setattr(module, name, converted)
            take(module)
        for path, entry in plan.facts["kept"].items():
            module = model.get_submodule(path)
            take(module)
            if not entry["wide"]:
                give(module, dtype)
        for network in model.variants if isinstance(model, ByTimestep) else [model]:
            give(network, torch.float32)
        return model


def own_weights(module: nn.Module) -> bool:
    """Whether a module owns fp32 weights itself."""
    return any(parameter.dtype == torch.float32 for parameter in module.parameters(recurse=False))


def take(module: nn.Module) -> None:
    """Have a layer without children take floating-point inputs in the type of its weights; once."""
    if not list(module.children()) and take_input not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(take_input, with_kwargs=True)


def take_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Inputs in the type of the layer's weights."""
    dtype = next(p.dtype for p in module.parameters(recurse=False) if p.is_floating_point())
    return in_dtype(args, dtype), in_dtype(kwargs, dtype)


def give(module: nn.Module, dtype: torch.dtype) -> None:
    """Have a module give floating-point outputs in this type; once."""
    hook = OUTPUTS[dtype]
    if hook not in module._forward_hooks.values():
        module.register_forward_hook(hook)


def give_output(dtype: torch.dtype, module: nn.Module, args: Any, result: Any) -> Any:
    """Outputs in this type."""
    del module, args
    return in_dtype(result, dtype)


OUTPUTS = {dtype: partial(give_output, dtype) for dtype in (torch.float32, *DTYPES.values())}
"""One hook for each type, so that a module is known to have it."""


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in a value, however nested, in another type; model outputs keep their class."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        converted = {key: in_dtype(part, dtype) for key, part in value.items()}
        return converted if type(value) is dict else type(value)(**converted)
    if type(value) in (tuple, list):
        return type(value)(in_dtype(part, dtype) for part in value)
    return value


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in floats(part)]


def finite(value: Any) -> bool:
    """Whether all floating-point numbers in a value are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in floats(value))


def vector(model: nn.Module, inputs: Inputs) -> Tensor:
    """All floating-point outputs of a call, end to end."""
    return torch.cat([tensor.double().flatten() for tensor in floats(model(**inputs))])


def watch(
    model: nn.Module, owners: Mapping[str, nn.Module], context: Context, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """What each layer meets in calibration: largest input and output, and its own relative error in another type."""
    seen: dict[str, dict[str, float]] = {}

    def look(path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        values = seen.setdefault(path, {"input": 0.0, "output": 0.0, "error": 0.0})
        given, got = floats([args, kwargs]), floats(result)
        values["input"] = max(values["input"], *(largest(t) for t in given), 0.0)
        values["output"] = max(values["output"], *(largest(t) for t in got), 0.0)
        if not list(module.children()) and got:
            values["error"] = max(values["error"], error_of(module, args, kwargs, got[0], dtype))

    hooks = [module.register_forward_hook(partial(look, path), with_kwargs=True) for path, module in owners.items()]
    try:
        with torch.no_grad():
            for number, inputs in enumerate(context.calibration):
                context.say(number, len(context.calibration), "calibrating")
                model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def largest(tensor: Tensor) -> float:
    """Largest magnitude; 0 of nothing."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def error_of(module: nn.Module, args: Any, kwargs: Any, exact: Tensor, dtype: torch.dtype) -> float:
    """Relative L2 error of a layer computed in another type, on an input of its own; 0 where that is not finite.

    Values that overflow are told by their size; a layer without output has no error.
    """
    weights = {name: p.to(dtype) if p.is_floating_point() else p for name, p in module.named_parameters()}
    twin = share(module)
    twin._forward_hooks.clear()
    result = torch.func.functional_call(twin, weights, in_dtype(args, dtype), in_dtype(kwargs, dtype))
    got = floats(result)[0].to(exact.dtype)
    error = float((got - exact).norm() / exact.norm().clamp(min=1e-12))
    return error if error < float("inf") else 0.0
