"""A module as an exported program: what targets build from that compile PyTorch's own operators, and not ONNX's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.targets.dimensions import Axes, called_plainly, conclusions_heard, declared, refuse_narrowed
from enginewright.targets.onnx_export import quiet_exporter


def export_program(module: nn.Module, example: Mapping[str, Tensor], *, dynamic: Axes) -> torch.export.ExportedProgram:
    """Trace a module; the program shares its weights, takes inputs by name, and gives tensors alone.

    Args:
        module: in eval mode.
        example: inputs by name; each dynamic dimension at least 2, or the tracer takes it for a constant.
        dynamic: for each input, the dimensions that may change, as for ``export_onnx``.

    Raises:
        ToolchainError: the module cannot be traced, or does not hold for the dimensions' whole ranges.
    """

    def traced() -> torch.export.ExportedProgram:
        with quiet_exporter(), torch.no_grad(), called_plainly(module, dynamic, list(example)):
            return torch.export.export(
                module, (), dict(example), dynamic_shapes=declared(dynamic, example), strict=False
            )

    def conclusions() -> list[str]:
        with conclusions_heard() as heard:
            traced()
        return heard

    try:
        program = traced()
    except (RuntimeError, ValueError, TypeError, AssertionError) as cause:  # torch's errors have no common base
        said = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ToolchainError(f"torch.export refuses the model: {said}") from cause
    refuse_narrowed(program, dynamic, conclusions)
    return program
