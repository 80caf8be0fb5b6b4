"""Where training computes: one device, or the several processes that ``accelerate launch`` started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from enginewright.ground.errors import UnavailableError, require
from enginewright.passes.contract import Inputs


class Devices:
    """One device."""

    number, count = 0, 1

    def __init__(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise UnavailableError("device is 'cuda', and PyTorch finds no such device", help="take device = 'cpu'")
        self.device = torch.device(device)

    def own(self, calls: list[Inputs]) -> list[Inputs]:
        """This process's share of a step's calls, on its device."""
        return self.everything(calls[self.number :: self.count])

    def everything(self, calls: list[Inputs]) -> list[Inputs]:
        """All of these calls on its device."""
        return [{name: tensor.to(self.device) for name, tensor in call.items()} for call in calls]

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over processes."""
        return list(tensors)


class Accelerated(Devices):
    """One device of each process; gradients are averaged, so that all processes keep the same weights."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.accelerator: Any = require("accelerate", extra="accelerate").Accelerator(cpu=device == "cpu")
        self.device = self.accelerator.device
        self.number, self.count = self.accelerator.process_index, self.accelerator.num_processes

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over processes."""
        return [self.accelerator.reduce(tensor, reduction="mean") for tensor in tensors]
