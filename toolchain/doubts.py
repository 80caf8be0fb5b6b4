"""What a figure cannot show: ranges that were guessed, and half precision on a processor that computes in single."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Arrays
from enginewright.passes.kernel.graph_module import GraphModule
from enginewright.recipe import Recipe
from enginewright.reports import record, words
from enginewright.sources.contract import Model
from enginewright.targets.element_types import DTYPES, hollow, in_type
from enginewright.targets.pytorch_engine import flat

COPIED_UP_TO = 4 * 10**9
"""Bytes of weights that are copied to try half precision."""


def of_guessed_ranges(recipe: Recipe, model: Model, target: record.TargetRecord) -> str:
    """Why no gate may rest on the fidelity of a target: its static scales were calibrated on ranges that were guessed.

    Empty where inputs are like those in use, where somebody said which values they take, or where scales are dynamic.
    """
    calibrated = any(step.needs_calibration and step.formats for step in recipe.steps)
    static = target.parameters.get("int8", "static") == "static"
    if not (model.guessed and calibrated and static) or recipe.head.calibration.file:
        return ""
    return (
        f"scales were calibrated on guessed ranges of {words.listing(model.guessed)}: say which values they take "
        "(ranges, realistic), or give calibration inputs"
    )


class InHalf:
    """A module computed in half precision through and through; called with arrays, and answers in fp32.

    Args:
        module: its own weights stay as they are.
        dtype: ``float16`` or ``bfloat16``.
        outputs: names for what it returns.
    """

    def __init__(self, module: nn.Module, dtype: str, outputs: Sequence[str]) -> None:
        self.dtype, self.outputs = DTYPES[dtype], tuple(outputs)
        self.module, originals = hollow(module, self.dtype)
        for parameter in self.module.parameters():
            if parameter.numel() and (original := originals.get(parameter.data_ptr())) is not None:
                parameter.data.copy_(original)

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs. Raises ``ToolchainError`` where PyTorch cannot compute it in that type."""
        tensors = in_type({name: torch.from_numpy(array) for name, array in inputs.items()}, self.dtype)
        try:
            with torch.inference_mode():
                found = flat(self.module(**tensors))
        except (RuntimeError, ValueError) as cause:
            raise ToolchainError(f"PyTorch cannot compute it so: {str(cause).splitlines()[0]}") from cause
        floats = [each.float() if each.is_floating_point() else each for each in found]
        return {name: each.numpy() for name, each in zip(self.outputs, floats, strict=True)}


def in_half(recipe: Recipe, module: nn.Module, outputs: Sequence[str]) -> tuple[InHalf | None, str]:
    """The module in the half precision that an export was asked for; or why it is not tried, if it should be."""
    dtype = recipe.head.export.dtype
    if dtype not in ("float16", "bfloat16") or isinstance(module, GraphModule):
        return None, ""
    size = sum(each.numel() * each.element_size() for each in module.parameters())
    if size > COPIED_UP_TO:
        return None, f"its weights, {words.size(size)}, are too large to copy"
    return InHalf(module, dtype, outputs), ""
