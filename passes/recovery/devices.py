"""Where training computes: accelerate's device, in one process or in the several that ``accelerate launch`` started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from enginewright.ground.errors import UnavailableError, require
from enginewright.passes.contract import Inputs


class Devices:
    """One device of each process; gradients are averaged, so that all processes keep the same weights.

    Args:
        device: ``cpu`` or ``cuda``.
        share: whether the processes share each step's calls; otherwise each of them trains on all.
    """

    def __init__(self, device: str, *, share: bool = False) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise UnavailableError("device is 'cuda', and PyTorch finds no such device", help="take device = 'cpu'")
        self.accelerator = accelerator_on(device)
        self.device: torch.device = self.accelerator.device
        self.number: int = self.accelerator.process_index if share else 0
        self.count: int = self.accelerator.num_processes if share else 1

    def own(self, calls: list[Inputs]) -> list[Inputs]:
        """This process's share of a step's calls, on its device."""
        return self.everything(calls[self.number :: self.count])

    def everything(self, calls: list[Inputs]) -> list[Inputs]:
        """All of these calls on its device."""
        return [{name: tensor.to(self.device) for name, tensor in call.items()} for call in calls]

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes that share calls."""
        if self.count == 1:
            return list(tensors)
        return [self.accelerator.reduce(tensor, reduction="mean") for tensor in tensors]


def accelerator_on(device: str) -> Any:
    """accelerate's handle on the processes, on this kind of device.

    It keeps the first device of a process for good, though one step of a recipe may train on another than the next.

    Raises:
        UnavailableError: several processes are on another kind of device already.
    """
    accelerate = require("accelerate", extra="accelerate")
    state = accelerate.state.AcceleratorState
    known = state() if state._shared_state else None
    if known is not None and known.device.type != device:
        if known.num_processes > 1:
            raise UnavailableError(
                f"{known.num_processes} processes train on {known.device.type} already, not {device}"
            )
        state._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=device == "cpu")
