"""Units of a layer that are silent at some timesteps: a mask by timestep before the projection that reads them.

Shapes: B batch, T timesteps, U units (heads, groups of hidden units), W = U times their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from passes.traits import FeedForward, HeadedAttention
from passes.variants import guidance_rows, nearest


@dataclass
class Now:
    """Which row of every mask holds for each row of the batch, while a call is made."""

    index: Tensor | None = None
    copies: int = 1
    """How often the rows of a call follow one another inside the model."""


class MaskedOutput(nn.Module):
    """A projection whose input is multiplied by the mask of its timestep.

    Args:
        linear: reads ``first`` columns of something else, then W columns of units.
        mask: (T, U) of 0 and 1.
        first: the first column of a unit.
        now: tells the timestep.
    """

    mask: Tensor

    def __init__(self, linear: nn.Module, mask: Tensor, first: int, now: Now) -> None:
        super().__init__()
        self.linear, self.first, self.now = linear, first, now
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, ..., first + W) -> what the projection gives."""
        assert self.now.index is not None
        mask = self.mask[self.now.index].repeat(self.now.copies, 1)  # (B, U)
        units = x[..., self.first :].unflatten(-1, (mask.shape[1], -1))
        units = units * mask.view(-1, *[1] * (x.ndim - 2), mask.shape[1], 1).to(x.dtype)
        heard = units.flatten(-2)
        return self.linear(torch.cat([x[..., : self.first], heard], dim=-1) if self.first else heard)


def mask_units(
    model: nn.Module, masks: Mapping[str, tuple[HeadedAttention | FeedForward, Tensor]], times: str, at: Sequence[float]
) -> nn.Module:
    """Put masks (T, U) into a model, in place; those of ones only are left out.

    Args:
        model: called by name.
        masks: by layer path.
        times: name of the input (B,) that holds the timestep.
        at: the timesteps (T) of the masks' rows; a call takes the nearest.
    """
    now = Now(copies=guidance_rows(model))
    masks = {path: entry for path, entry in masks.items() if not bool(entry[1].all())}
    for layer, mask in masks.values():
        place = next(path for path, module in model.named_modules() if module is layer.output)
        first = layer.first_column if isinstance(layer, FeedForward) else 0
        model.set_submodule(place, MaskedOutput(layer.output, mask, first, now).train(layer.output.training))
    if not masks:
        return model
    object.__setattr__(model, "masking", (now, times, tuple(at)))
    own: Any = type(model)
    model.__class__ = timed(own)
    return model


@cache
def timed(base: type[Any]) -> type[nn.Module]:
    """A class like ``base`` that tells its masks the timestep of each call."""

    def forward(self: Any, **inputs: Any) -> Any:
        now, times, at = self.masking
        now.index = nearest(inputs[times].reshape(-1), at)
        try:
            return base.forward(self, **inputs)
        finally:
            now.index = None

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
