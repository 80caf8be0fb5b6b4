"""Networks on their way to a tracer: at which sizes, with which open dimensions; and as exported programs on demand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim
from enginewright.passes.contract import Inputs
from enginewright.sources.contract import Model
from enginewright.targets.dimensions import Axes
from enginewright.targets.exported_program import export_program


def sizes_of(model: Model) -> dict[str, int]:
    """The sizes that a model's dynamic dimensions are traced at."""
    return {d.name: traced_at(d) for spec in model.inputs for d in spec.shape if not isinstance(d, int)}


def traced_at(d: Dim) -> int:
    """The size to trace a dimension at: the typical one, but no 1, which the tracer takes for a constant."""
    return d.typical if d.typical > 1 else min(2, d.high)


def axes_of(model: Model) -> Axes:
    """For each input of a model the dimensions that may change, as tracers are told."""
    return {
        spec.name: {
            i: (d.name, d.low, d.high, d.multiple_of) for i, d in enumerate(spec.shape) if not isinstance(d, int)
        }
        for spec in model.inputs
    }


def program_on_demand(
    model: Model, network: nn.Module, example: Callable[[], Inputs], *, dtype: str | None
) -> Callable[[], torch.export.ExportedProgram]:
    """What traces a network when it is first asked, and then keeps the program for whoever asks next.

    Args:
        model: as the network is called.
        network: traced as it is.
        example: gives a call of it at ``sizes_of`` the model.
        dtype: the floating type that the graph is written in, where an export asked for one; no program is.
    """

    @cache
    def program() -> torch.export.ExportedProgram:
        if dtype is not None:
            raise ToolchainError(
                f"an exported program computes as the model does, and {dtype} was asked for",
                help="convert the model itself, with the pass convert_dtype, and leave --dtype out",
            )
        return export_program(network, example(), dynamic=axes_of(model))

    return program
