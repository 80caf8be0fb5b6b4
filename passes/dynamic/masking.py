"""Units of a layer that are silent at some timesteps: a mask by timestep before the projection that reads them.

Shapes: B batch, T timesteps, U units (heads, groups of hidden units), W = U times their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.passes.kernel.rows import repeated_rows
from enginewright.passes.kernel.wrap import AroundByName, Call, wrap
from enginewright.passes.traits import FeedForward, HeadedAttention


def nearest(t: Tensor, timesteps: Sequence[float]) -> Tensor:
    """Index (B,) of the timestep nearest to each row's own (B,)."""
    schedule = torch.tensor(timesteps, dtype=torch.float32, device=t.device)
    return (t[:, None].float() - schedule).abs().argmin(dim=1)


@dataclass
class Now:
    """Which row of every mask holds for each row of the batch, while a call is made."""

    index: Tensor | None = None
    copies: int = 1
    """How often the rows of a call follow one another inside the model."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some columns of a projection's input, and which of their units are heard.

    Args:
        mask: (T, U) of 0 and 1.
        first: the first column.
        width: of all units together.
    """

    mask: Tensor
    first: int
    width: int


class MaskedOutput(nn.Module):
    """A projection whose input is multiplied by the masks of its timestep.

    Args:
        linear: reads W columns.
        parts: of them, which do not overlap; all other columns are heard.
        now: tells the timestep.
    """

    def __init__(self, linear: nn.Module, parts: Sequence[Part], now: Now) -> None:
        super().__init__()
        self.linear, self.now = linear, now
        self.places = [(part.first, part.first + part.width) for part in parts]
        for number, part in enumerate(parts):
            self.register_buffer(f"mask_{number}", part.mask)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., W) -> what the projection gives."""
        assert self.now.index is not None
        for number, (first, end) in enumerate(self.places):
            mask = self.get_buffer(f"mask_{number}")[self.now.index].repeat(self.now.copies, 1)  # (B, U)
            units = x[..., first:end].unflatten(-1, (mask.shape[1], -1))
            units = units * mask.view(-1, *[1] * (x.ndim - 2), mask.shape[1], 1).to(x.dtype)
            pieces = [x[..., :first], units.flatten(-2), x[..., end:]]
            x = torch.cat([piece for piece in pieces if piece.shape[-1]], dim=-1)
        return self.linear(x)


def columns_of(layer: HeadedAttention | FeedForward) -> tuple[int, int]:
    """Where in its output projection's input the units of a layer begin, and how wide they are together."""
    if isinstance(layer, FeedForward):
        return layer.first_column, layer.hidden
    return 0, layer.heads * layer.head_dim


def mask_units(
    model: nn.Module,
    masks: Sequence[tuple[HeadedAttention | FeedForward, Tensor]],
    times: str,
    at: Sequence[float],
) -> nn.Module:
    """Put masks (T, U) of layers into a model, in place; those of ones only are left out.

    Args:
        model: called by name.
        masks: each with its layer; an attention and a feed-forward may share a projection.
        times: name of the input (B,) that holds the timestep.
        at: the timesteps (T) of the masks' rows; a call takes the nearest.
    """
    now = Now(copies=repeated_rows(model))
    parts: dict[nn.Module, list[Part]] = {}
    for layer, mask in masks:
        first, width = columns_of(layer)
        for output in (
            () if bool(mask.all()) else layer.outputs if isinstance(layer, HeadedAttention) else [layer.output]
        ):
            parts.setdefault(output, []).append(Part(mask=mask, first=first, width=width))
    for linear, own in parts.items():
        place = next(path for path, module in model.named_modules() if module is linear)
        model.set_submodule(place, MaskedOutput(linear, own, now).train(linear.training))
    if not parts:
        return model
    wrap(model, Timed(now=now, times=times, at=tuple(at)))
    return model


@dataclass(frozen=True, kw_only=True)
class Timed(AroundByName):
    """A model that tells its masks the timestep of each call.

    Args:
        now: what the masks ask.
        times: name of the input (B,) that holds the timestep.
        at: the timesteps (T) of the masks' rows.
    """

    now: Now
    times: str
    at: tuple[float, ...]

    def answer(self, forward: Call, inputs: dict[str, Any]) -> Any:
        """Answer a call."""
        self.now.index = nearest(inputs[self.times].reshape(-1), self.at)
        try:
            return forward(**inputs)
        finally:
            self.now.index = None
