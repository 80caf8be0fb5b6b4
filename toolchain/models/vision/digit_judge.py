"""A small convolutional classifier of digits: the judge that reads what ``dit:digits`` draws.

Ours; no paper. Its 64 features also carry the Frechet distance, which is therefore no FID and never called so.

Shapes: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec


@dataclass(frozen=True, kw_only=True)
class Config:
    """Channels of the three convolution stages, width of the features, number of classes."""

    channels: tuple[int, int, int] = (16, 32, 64)
    features: int = 64
    classes: int = 10


PUBLISHED: dict[str, Config] = {}
SHIPPED = {"digits": Config()}
TINY = Config(channels=(2, 4, 8), features=8)
OUTPUTS = ("logits",)


class Stage(nn.Sequential):
    """Convolution, batch norm, ReLU, and halving of both sides (rounded down)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2))


class DigitJudge(nn.Module):
    """Read a digit from a 28 x 28 picture with values in [-1, 1]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        one, two, three = config.channels
        self.stages = nn.Sequential(Stage(1, one), Stage(one, two), Stage(two, three))
        self.embed = nn.Linear(three * 16, config.features)
        self.head = nn.Linear(config.features, config.classes)

    def features(self, x: Tensor) -> Tensor:
        """X (B, 1, 28, 28) -> (B, 64)."""
        padded = F.pad(x, (2, 2, 2, 2), value=-1.0)  # (B, 1, 32, 32)
        return F.relu(self.embed(self.stages(padded).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """X (B, 1, 28, 28) -> logits (B, 10)."""
        return self.head(self.features(x))


def build(config: Config) -> DigitJudge:
    """The network, untrained."""
    return DigitJudge(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Pictures of digits, white on black, from -1 to 1."""
    del config
    return (InputSpec(name="x", shape=(Dim(name="batch", low=1, typical=8, high=256), 1, 28, 28), low=-1, high=1),)
