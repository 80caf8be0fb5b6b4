"""How Vevo's tokens and mel frames are drawn: filtered token probabilities, guided midpoint steps along the flow.

Source: Zhang et al. 2025, arXiv:2502.07243; the values are the defaults of the authors' released pipeline. Checked
against open-mmlab/Amphion at d3de90f (fmt_model.py, ar_model.py, vevo_utils.py): order of operations, and equal frames
from the same noise.

Departure: the standard deviations in guidance are those of each sample's own frames, so that a result does not depend
on what else is in the batch; the authors take them over the whole batch, and run one sample.

Shapes: B batch, P frames of the prompt, T frames to draw, C mel channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""x (B, L, C), t (B,), codes (B, L), mask (B, L) -> velocity (B, L, C)."""

MEL_MEAN = -4.92
MEL_VARIANCE = 8.14
SIGMA = 1e-5
"""Noise that is left at time 1."""
STEPS = 32
GUIDANCE = 1.0
RESCALE = 0.75
TEMPERATURE = 0.8
TOP_K = 50
TOP_P = 0.9
FEWEST_TOKENS = 50
"""New tokens before the mark that ends generation may be drawn."""


def normalize_mel(mel: Tensor) -> Tensor:
    """Logarithmic mel -> the values that the flow draws and the vocoder reads, near zero mean and unit variance."""
    return (mel - MEL_MEAN) / math.sqrt(MEL_VARIANCE)


def denormalize_mel(mel: Tensor) -> Tensor:
    """The logarithmic mel that ``normalize_mel`` gives these values of."""
    return mel * math.sqrt(MEL_VARIANCE) + MEL_MEAN


def training_pair(mel: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mel and noise (B, T, C), t (B,) -> the noisy frames at t and their velocity, each (B, T, C)."""
    t = t[:, None, None]
    return (1 - (1 - SIGMA) * t) * noise + t * mel, mel - (1 - SIGMA) * noise


def warp_time(u: Tensor) -> Tensor:
    """Uniform u in [0, 1] -> training times, of which more lie near 0, where the start is harder."""
    return 1 - torch.cos(u * math.pi / 2)


def midpoints(steps: int) -> list[float]:
    """The times at which ``steps`` Euler steps from 0 to 1 ask for the velocity."""
    return [(i + 0.5) / steps for i in range(steps)]


def spread(x: Tensor) -> Tensor:
    """X (B, T, C) -> each sample's standard deviation (B, 1, 1)."""
    return x.flatten(1).std(dim=1)[:, None, None]


def guide(velocity: Tensor, free: Tensor, *, scale: float = GUIDANCE, rescale: float = RESCALE) -> Tensor:
    """Move a velocity away from the unconditional one, and bring its spread back most of the way.

    Args:
        velocity: (B, T, C) with the prompt and the codes, of the frames to draw alone: no prompt, no padding.
        free: (B, T, C) without them.
        scale: how far to move; 0 is no guidance.
        rescale: the share of the result whose spread is that of ``velocity``.

    Returns:
        The guided velocity (B, T, C).
    """
    guided = velocity + scale * (velocity - free)
    return rescale * guided * spread(velocity) / spread(guided) + (1 - rescale) * guided


def padded(x: Tensor, length: int) -> Tensor:
    """X (B, L, ...) with zeros after its frames -> (B, length, ...)."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))


def draw_mel(
    velocity: Velocity,
    prompt: Tensor,
    codes: Tensor,
    noise: Tensor,
    *,
    none: int,
    steps: int = STEPS,
    scale: float = GUIDANCE,
    rescale: float = RESCALE,
    length: int | None = None,
) -> Tensor:
    """Carry noise to mel frames that continue a prompt, by Euler steps with the velocity at their midpoints.

    Args:
        velocity: the network. Without a condition it sees the frames to draw alone, from position 0 on.
        prompt: (B, P, C) normalised mel frames of the timbre reference.
        codes: (B, P + T) content-style codes of prompt and result.
        noise: (B, T, C), unit variance.
        none: the code that means "no condition".
        steps: Euler steps; the network is called twice for each.
        scale: guidance; 0 is none, and one call for each step.
        rescale: as in ``guide``.
        length: frames that every call is padded to, for a network of one length; by default each has its own.

    Returns:
        Normalised mel frames (B, T, C).
    """
    before, count = prompt.shape[1], noise.shape[1]
    given, alone = length or before + count, length or count
    mask_given = padded(torch.ones_like(codes, dtype=noise.dtype), given)
    mask_alone = padded(torch.ones_like(noise[..., 0]), alone)
    codes_alone = torch.full_like(mask_alone, none, dtype=codes.dtype)
    codes_given = padded(codes, given)
    x = noise
    for time in midpoints(steps):
        t = x.new_full((len(x),), time)
        v = velocity(padded(torch.cat([prompt, x], dim=1), given), t, codes_given, mask_given)
        v = v[:, before : before + count]
        if scale > 0:
            free = velocity(padded(x, alone), t, codes_alone, mask_alone)[:, :count]
            v = guide(v, free, scale=scale, rescale=rescale)
        x = x + v / steps
    return x


def token_probabilities(
    logits: Tensor,
    *,
    forbidden: int | None = None,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    top_p: float = TOP_P,
) -> Tensor:
    """Probabilities to draw the next token from: the likeliest ``top_k``, less those after a share of ``top_p``.

    Args:
        logits: (B, V).
        forbidden: an id that may not come, as the end mark before ``FEWEST_TOKENS``.
        temperature: what logits are divided by first.
        top_k: most ids that are left.
        top_p: of those, the likeliest ids until their sum reaches this share are left.

    Returns:
        Probabilities (B, V); each row sums to 1.
    """
    if forbidden is not None:
        logits = logits.index_fill(1, torch.tensor([forbidden], device=logits.device), -math.inf)
    best, ids = (logits / temperature).topk(min(top_k, logits.shape[1]), dim=1)
    share = best.softmax(dim=1)
    share = torch.where(share.cumsum(dim=1) - share < top_p, share, 0.0)
    return torch.zeros_like(logits).scatter(1, ids, share / share.sum(dim=1, keepdim=True))
