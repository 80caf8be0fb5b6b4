"""Switti's quantizer as drawing uses it: a scale's codes are added to the picture so far, and the next scale is read.

Source: Voronov et al. 2024, arXiv:2412.01819 (Switti), which takes it from Tian et al. 2024, arXiv:2404.02905 (VAR,
algorithm 2). Checked against yandex-research/switti at 3b286b5: parameter counts, order of operations, and equal maps
and features with the same weights at every scale. Attribute names are those of a released checkpoint after
``quantize``, but for ``qresi_ls``, which lies in their ``quant_resi``. What differs: enlarging a map (bicubic) and
averaging one (areas, which may overlap) are products with constant matrices, so that one graph serves all scales; of
the four convolutions that scales share all are computed, and one is taken: 28 million products in vain for 512 pixels.

Shapes: B batch, L tokens of a scale, K of the next, N of all scales, C channels of a code, R side of the picture in
cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Array, Arrays, Dim, InputSpec
from enginewright.models.diffusion.csd_var.scales import SCALES_512, scale_of_slots, starts

SHARED = 4
"""Convolutions that all scales share."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of the quantizer.

    Args:
        codes: entries of the codebook.
        channels: of a code.
        scales: sides of the token maps; the last is the picture's side in cells.
    """

    codes: int = 4096
    channels: int = 32
    scales: tuple[int, ...] = SCALES_512

    @property
    def side(self) -> int:
        """The picture's side in cells."""
        return self.scales[-1]


PUBLISHED = {"512": Config()}
TINY = Config(codes=64, channels=8, scales=(1, 2, 3, 4, 5))
SHIPPED: dict[str, Config] = {}
OUTPUTS = ("new_map", "features")
JOB_NEEDS_TRAINING = False
"""Whether calls like those in use say nothing of random weights: a run goes through its scales with any."""


def resampling(config: Config) -> tuple[Tensor, Tensor]:
    """Matrices between tokens of all scales and cells: how much each token adds to a cell (bicubic), and takes of it.

    Each is (N, R*R).
    """
    up, down = [], []
    for side in config.scales:
        tokens = torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)
        cells = torch.eye(config.side**2, dtype=torch.float64).view(-1, 1, config.side, config.side)
        up.append(F.interpolate(tokens, size=config.side, mode="bicubic").flatten(1))
        down.append(F.interpolate(cells, size=side, mode="area").flatten(1).mT)
    return torch.cat(up).float(), torch.cat(down).float()


def shared_of_scales(config: Config) -> list[int]:
    """For each scale the convolution that it has: that whose tick is nearest to its share of the way."""
    ticks = np.linspace(1 / 3 / SHARED, 1 - 1 / 3 / SHARED, SHARED)
    last = len(config.scales) - 1
    return [int(np.abs(ticks - number / last).argmin()) for number in range(last + 1)]


class Quantizer(nn.Module):
    """Add what a scale's codes say to the picture so far, and read it at the next scale's resolution."""

    up: Tensor
    down: Tensor
    shared: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codes, config.channels)
        self.qresi_ls = nn.ModuleList(nn.Conv2d(config.channels, config.channels, 3, padding=1) for _ in range(SHARED))
        up, down = resampling(config)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("down", down, persistent=False)
        shared = torch.tensor(shared_of_scales(config))[scale_of_slots(config.scales)]
        self.register_buffer("shared", shared, persistent=False)

    def forward(self, ids: Tensor, position: Tensor, following: Tensor, map: Tensor) -> tuple[Tensor, Tensor]:
        """Add a scale.

        Args:
            ids: codes (B, L) of all tokens of the scale.
            position: the slot of the first of them, int64 ().
            following: the slots of the next scale's tokens, int64 (K,).
            map: the picture so far (B, C, R, R); zeros before the first scale.

        Returns:
            The map after it, and the features of the next scale's tokens (B, K, C).
        """
        slots = position + torch.arange(ids.shape[1], device=ids.device)
        codes = self.embedding(ids)  # (B, L, C)
        h = codes.mT @ self.up[slots].to(codes.dtype)  # (B, C, R*R)
        h = h.unflatten(-1, (self.config.side, self.config.side))
        smoothed = torch.stack([conv(h) for conv in self.qresi_ls])  # (4, B, C, R, R)
        map = map + 0.5 * h + 0.5 * smoothed.index_select(0, self.shared[position.reshape(1)])[0]
        return map, self.down[following].to(map.dtype) @ map.flatten(2).mT


def build(config: Config) -> Quantizer:
    """The quantizer with PyTorch's own start; codes are standard normal."""
    return Quantizer(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """A scale's codes and place, the next scale's places, and the picture so far."""
    batch = Dim(name="batch", low=1, typical=1, high=4)
    middle, most = config.scales[len(config.scales) // 2], config.side**2
    tokens = Dim(name="tokens", low=1, typical=middle**2, high=most)
    following = Dim(name="following", low=1, typical=middle**2, high=most)
    everything = starts(config.scales)[-1]
    return (
        InputSpec(name="ids", shape=(batch, tokens), dtype="int64", low=0, high=config.codes),
        InputSpec(name="position", shape=(), dtype="int64", low=0, high=starts(config.scales)[-2] + 1, default=0),
        InputSpec(name="following", shape=(following,), dtype="int64", low=0, high=everything),
        InputSpec(name="map", role="sample", shape=(batch, config.channels, config.side, config.side)),
    )


def call_of(config: Config, ids: Array, scale: int, map: Array) -> Arrays:
    """The call that adds a scale; after the last one features are read once more at that scale."""
    places, after = starts(config.scales), min(scale + 1, len(config.scales) - 1)
    return {
        "ids": ids,
        "position": np.asarray(places[scale], np.int64),
        "following": np.arange(places[after], places[after + 1]),
        "map": map,
    }


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]]:
    """The calls of runs: each scale in its turn, with codes and maps drawn at random."""

    def calls(count: int, seed: int) -> list[Arrays]:
        found = []
        for number in range(count):
            rng, scale = np.random.default_rng([seed, number]), number % len(config.scales)
            ids = rng.integers(0, config.codes, (1, config.scales[scale] ** 2))
            so_far = rng.standard_normal((1, config.channels, config.side, config.side)).astype(np.float32)
            found.append(call_of(config, ids, scale, so_far))
        return found

    return calls
