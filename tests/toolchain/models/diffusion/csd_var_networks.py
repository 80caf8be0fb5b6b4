"""What the tests of CSD-VAR's networks share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def numel(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def loud(network: Net) -> Net:
    """The network with weights so large that every mechanism speaks up."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            fan_in = weight[0].numel() if weight.dim() > 1 else 4
            weight.normal_(1.0 if "norm" in name and weight.dim() == 1 else 0.0, fan_in**-0.5, generator=generator)
    return network.eval().requires_grad_(False)
