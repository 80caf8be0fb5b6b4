"""What a student is trained by: its outputs, features, attention maps and token relations beside a teacher's.

Every loss is zero for a student that equals its teacher. Sources: Dense2MoE, ICCV 2025 (weights of feature losses);
HASTE, arXiv:2505.16792 (attention maps); Hybrid Distillation, arXiv:2306.15876 (relations, several teachers).

Shapes: B batch, H heads, N tokens, M tokens looked at, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-12
"""Below this a mean square counts as nothing."""


def output_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of each output over the teacher's mean square, averaged over outputs."""
    return torch.stack([relative(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's mean square; both of any one shape."""
    student, teacher = student.float(), teacher.float()
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp(min=TINY)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], output: Tensor) -> Tensor:
    """Squared errors of features, each weighted so that no layer drowns the others (Dense2MoE).

    w_l = |L_output| / |L_l| * mean of all ||f_teacher|| / ||f_teacher_l||; the weights carry no gradient. Departure:
    the mean over layers is taken, not their sum, so that a weight means the same whatever the depth.

    Args:
        student: features of each layer.
        teacher: as many, of the same shapes.
        output: the output loss L_output.
    """
    losses = torch.stack([F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)])  # (L,)
    norms = torch.stack([t.float().norm() for t in teacher]).clamp(min=TINY)
    weights = output.detach().abs() / losses.detach().clamp(min=TINY) * norms.mean() / norms
    return (weights * losses).mean()


def log_map(query: Tensor, key: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None) -> Tensor:
    """Logarithm of an attention map: query (B, H, N, D), key (B, H or fewer, M, D) -> (B, H, N, M).

    Args:
        query: as ``scaled_dot_product_attention`` takes it.
        key: as well; fewer heads are repeated, as for grouped queries.
        mask: added to the logits, or True where one may look.
        causal: whether nothing later may be looked at.
        scale: of the logits; None: one over the root of D.
    """
    query, key = query.float(), key.float()
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.clamp(min=-1e4).log_softmax(dim=-1)  # finite: 0 * (-inf) would be no number


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Divergence of each row of the student's maps from the teacher's, averaged over rows and layers (HASTE).

    HASTE's cross-entropy less the teacher's own entropy: the same gradient, and zero where the maps agree. Departure:
    where heads were removed nothing says which is which, so the maps' means over heads are compared.

    Args:
        student: logarithms of maps (B, H, N, M), one for each layer.
        teacher: the same; H may differ.
    """
    return torch.stack([divergence(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two logarithms of maps (B, H, N, M), averaged over rows."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (logs.exp().mean(dim=1).clamp(min=1e-30).log() for logs in (student, teacher))
    return (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


def relation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean square difference of the tokens' cosine similarities, averaged over layers; widths may differ.

    Departure from Hybrid Distillation: similarities of block outputs, not of queries, keys and values.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(similarities(s), similarities(t)) for s, t in pairs]).mean()


def similarities(tokens: Tensor) -> Tensor:
    """Cosine of each pair of tokens: (B, N, D) -> (B, N, N)."""
    unit = F.normalize(tokens.float(), dim=-1)
    return unit @ unit.transpose(-2, -1)
