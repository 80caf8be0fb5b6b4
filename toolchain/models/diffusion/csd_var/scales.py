"""Scales of a picture that is drawn from coarse to fine, which of them carry style, and how guidance grows over them.

Source: Nguyen et al. 2025, arXiv:2507.13984 (scale-aware optimisation); the base is Switti, Voronov et al. 2024,
arXiv:2412.01819. Shapes: B batch, N tokens of all scales, L of one, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
"""Sides of the token maps of a picture of 512 pixels."""
SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
"""Sides of the token maps of a picture of 1024 pixels."""

Split = Literal["paper", "released-tuning", "released-drawing"]
STYLE_SCALES: dict[Split, tuple[int, ...]] = {
    "paper": (0, 1, 2, 9),
    "released-tuning": (0, 1, 2),
    "released-drawing": (0, 1, 2, 3),
}
"""Scales, from 0, that carry style, of ten; the others carry content.

The paper has scales 1 to 3 and 10 of ten. The authors' code tunes with the first three, and draws with the style's text
up to the fourth.
"""
FROM_CONTENT = 3
"""The scale, from 0, at which the content's memory is put before the keys; the style's is at scale 0."""
MINOR = 0.1
"""Weight of the content scales in the loss of the style."""


def starts(scales: Sequence[int]) -> list[int]:
    """Where each scale's tokens begin, and where the last one's end: one entry more than there are scales."""
    found = [0]
    for side in scales:
        found.append(found[-1] + side * side)
    return found


def scale_of_slots(scales: Sequence[int]) -> Tensor:
    """For each of the N tokens the number of its scale, int64 (N,)."""
    return torch.tensor([number for number, side in enumerate(scales) for _ in range(side * side)])


def guided(conditional: Tensor, unconditional: Tensor, scale: int, *, scales: int, guidance: float = 6.0) -> Tensor:
    """Logits (B, L, V) pushed away from those of no text, by more at finer scales: not at all at the first."""
    t = guidance * scale / (scales - 1)
    return (1 + t) * conditional - t * unconditional


def keep_likely(logits: Tensor, *, top_k: int = 400, top_p: float = 0.95) -> Tensor:
    """Logits (B, L, V) with minus infinity for codes that are not drawn.

    Those are all but the ``top_k`` likeliest, and of these the least likely that together have at most 1 - ``top_p``.
    """
    least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    logits = logits.masked_fill(logits < least, -torch.inf)
    ordered, order = logits.sort(dim=-1)
    rare = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    rare[..., -1] = False
    return logits.masked_fill(rare.scatter(-1, order, rare), -torch.inf)


def tuning_loss(
    logits: Tensor, ids: Tensor, scales: Sequence[int], *, of_style: bool, split: Split = "released-tuning"
) -> Tensor:
    """The loss that one update of the learned embeddings and memories lowers: of style and of content by turns.

    Args:
        logits: (B, N, V), of a whole pass.
        ids: the picture's codes (B, N).
        scales: sides of the token maps.
        of_style: whether it is the style's turn: its scales, and a little of the others; else the content's alone.
        split: which scales are the style's.

    Returns:
        (); the mean over the tokens of each group of scales, as in the authors' code, where the paper writes a sum.
    """
    loss = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # (B, N)
    style = torch.isin(scale_of_slots(scales), torch.tensor(STYLE_SCALES[split])).to(loss.device)
    content = loss[:, ~style].mean()
    return loss[:, style].mean() + MINOR * content if of_style else content
