"""Which tokens survived, as small pictures for the report."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from enginewright.passes.contract import Context, Inputs, TokenMap
from enginewright.passes.tokens.dropping import keep_maps

SHOWN = 4
"""Inputs that are shown."""


def token_maps(model: nn.Module, context: Context, *, leading: int) -> list[TokenMap]:
    """Which tokens of the first inputs stayed.

    Args:
        model: with its borders, all in one stack.
        context: whose calibration inputs, or else the example, are shown; none gives nothing, nor does a model on meta.
        leading: tokens before the content, which always stay and are not shown.

    A square number of tokens is laid out as a square. ``picture`` is the input itself at a pixel per token, rows of
    [red, green, blue] from 0 to 255; empty where no input is an image batch (B, 1 or 3, H, W).
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return []
    calls = list(context.calibration[:SHOWN]) or ([context.example] if context.example else [])
    shown: list[TokenMap] = []
    for call in calls:
        maps = keep_maps(model, call)[:, :, leading:]  # (B, borders, N)
        for number, left in enumerate(maps.sum(dim=1)[: SHOWN - len(shown)]):
            side = math.isqrt(len(left))
            rows = left.reshape(side, side) if side * side == len(left) else left[None]
            picture = thumbnail(call, number, (rows.shape[0], rows.shape[1]))
            shown.append(TokenMap(left=rows.tolist(), borders=maps.shape[1], picture=picture))
    return shown


def thumbnail(call: Inputs, number: int, size: tuple[int, int]) -> list[list[list[int]]]:
    """The call's ``number``-th picture at a pixel per token, its own range stretched to 0 to 255."""
    images = [x for x in call.values() if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)]
    if len(images) != 1 or size[0] == 1:
        return []
    small = functional.adaptive_avg_pool2d(images[0][number].detach().float(), size)
    low, high = small.amin(), small.amax()
    pixels = ((small - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny) * 255).round().int()
    found: list[list[list[int]]] = pixels.expand(3, *size).permute(1, 2, 0).tolist()
    return found
