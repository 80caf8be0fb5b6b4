"""How a denoiser reads its timestep and its class: sinusoids with an MLP, and a table with a row for "no class".

Source: Peebles and Xie 2022, arXiv:2212.09748, whose release later denoisers take these parts from. Parameter names are
those of the release.

Shapes: B batch, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, then a two-layer MLP."""

    FREQUENCIES = 128
    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        rate = -math.log(10000) / self.FREQUENCIES
        # Not persistent: the authors' checkpoints do not carry this table.
        self.register_buffer("frequencies", torch.exp(rate * torch.arange(self.FREQUENCIES)), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """T (B,) in diffusion steps -> (B, D)."""
        angle = t[:, None].float() * self.frequencies  # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A row for each class, and a last row for "no class", which classifier-free guidance needs."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """Y (B,) -> (B, D)."""
        return self.embedding_table(y)
