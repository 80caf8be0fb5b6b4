"""Two linear layers and a ReLU; the smallest reference model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec


@dataclass(frozen=True, kw_only=True)
class Config:
    """Width of the input, and of the layer in between."""

    width: int = 8
    hidden: int = 16


PUBLISHED = {"S": Config(width=32, hidden=64)}
SHIPPED: dict[str, Config] = {}
TINY = Config()
OUTPUTS = ("y",)


class TwoLayers(nn.Module):
    """x (B, W) -> y (B, 4)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, W) -> (B, 4)."""
        return self.second(torch.relu(self.first(x)))


def build(config: Config) -> TwoLayers:
    """The network, untrained."""
    return TwoLayers(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Rows of numbers."""
    return (InputSpec(name="x", shape=(Dim(name="batch", low=1, typical=4, high=64), config.width)),)
