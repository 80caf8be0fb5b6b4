"""Which tokens go into which, and carrying that out in operators that every runtime has.

Source: Bolya et al. 2022, arXiv:2210.09461 (ToMe), section 3 and the authors' ``merge.py``. Departures: tokens that
stay keep their order also where there is no class token (the authors sort only where there is one; attention does
not see the order); sorting is done by TopK, so that it can be exported.

Shapes: B batch, N tokens in, M tokens out, r merged, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Literal["onehot", "scatter"]


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, D), index (B, M) -> (B, M, D), as one gather of whole rows."""
    first = (torch.ones_like(index[:, :1]).cumsum(0) - 1) * x.shape[1]  # (B, 1); Range needs more of a runtime
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def ascending(index: Tensor) -> Tensor:
    """Indices (B, M) in ascending order."""
    count = index.shape[1]
    return (-(-index.float()).topk(count).values).long()


def inverse(order: Tensor) -> Tensor:
    """The inverse (B, N) of a permutation (B, N)."""
    places = torch.ones_like(order).cumsum(1) - 1
    return torch.zeros_like(order).scatter(1, order, places)


def row(indices: Sequence[int], like: Tensor) -> Tensor:
    """Constant indices (M,) beside a tensor."""
    return torch.tensor(indices, dtype=torch.long, device=like.device)


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which tokens stay and which go into which.

    Args:
        stay: index of each token that stays (B, M); row m of the result is that token, and what goes into it.
        go: index of each token that goes (B, r).
        into: row of the result that it goes into (B, r).
    """

    stay: Tensor
    go: Tensor
    into: Tensor

    def merge(self, x: Tensor, size: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
        """Means of tokens (B, N, D), weighted by sizes (B, N; None: 1), and the sizes (B, M) of what comes out."""
        count, order = self.stay.shape[1], torch.cat([self.stay, self.go], dim=1)
        if size is None:
            size = torch.ones_like(x[:, :, 0])
            moved, weight = rows(x, order), size
        else:
            moved, weight = rows(x * size[..., None], order), size.gather(1, order)
        total = self.summed(moved[:, :count], moved[:, count:], form)
        weight = self.summed(weight[:, :count, None], weight[:, count:, None], form)
        return total / weight, weight.squeeze(-1)

    def behind(self, x: Tensor, ahead: int) -> Matching:
        """The same among tokens (B, N, D) of which the first ``ahead`` stay, and were not counted."""
        first = torch.ones_like(x[:, :ahead, 0], dtype=torch.long).cumsum(1) - 1
        return Matching(stay=torch.cat([first, self.stay + ahead], dim=1), go=self.go + ahead, into=self.into + ahead)

    def summed(self, stay: Tensor, go: Tensor, form: Form) -> Tensor:
        """Add rows (B, r, D) to those of (B, M, D) that they go into."""
        if form == "scatter":
            return stay.scatter_add(1, self.into[..., None].expand_as(go), go)
        places = torch.arange(stay.shape[1], device=stay.device)[:, None]
        return stay + (self.into[:, None] == places).to(stay) @ go  # (B, M, r) @ (B, r, D)

    def rows_of(self) -> Tensor:
        """The row of the result (B, N) that each token is in."""
        own = torch.ones_like(self.stay).cumsum(1) - 1  # (B, M)
        order = torch.cat([self.stay, self.go], dim=1)
        return torch.cat([own, self.into], dim=1).gather(1, inverse(order))


def clipped(r: int, tokens: int, leading: int) -> int:
    """How many of so many tokens can be merged at once: at most half of those that are no leading ones."""
    return max(min(r, (tokens - leading) // 2), 0)


def match(metric: Tensor, r: int, *, leading: int, into: Sequence[int] | None = None) -> Matching:
    """Let the r tokens go that are most like one of those that may receive, each into the one that it is most like.

    Args:
        metric: what is compared, by cosine (B, N, C).
        r: how many go, between 1 and the number of those that may.
        leading: tokens at the front that take no part.
        into: indices of the tokens that receive; None: those at odd indices. The others may go.
    """
    tokens = metric.shape[1]
    into = list(range(leading + (leading + 1) % 2, tokens, 2)) if into is None else into
    may_go = sorted(set(range(leading, tokens)) - set(into))
    unit = F.normalize(metric.float(), dim=-1)  # in half precision, equal scores would be many
    first, second = row(may_go, metric), row(into, metric)
    scores = unit.index_select(1, first) @ unit.index_select(1, second).transpose(1, 2)
    best, partner = scores.max(dim=-1)  # each (B, may go)
    chosen = best.topk(r).indices  # (B, r)
    places = torch.arange(len(may_go), device=metric.device)
    going = (chosen[..., None] == places).any(dim=1)  # (B, may go)
    kept = len(may_go) - r
    staying = (-places.float()).masked_fill(going, float("-inf")).topk(kept).values if kept else best[:, :0]
    batch = metric.shape[0]  # not len(), which would fix it
    stay = [row(range(leading), metric).expand(batch, -1), first[(-staying).long()], second.expand(batch, -1)]
    return Matching(stay=torch.cat(stay, dim=1), go=first[chosen], into=partner.gather(1, chosen) + leading + kept)


def cell_corners(tokens: int, *, leading: int) -> list[int]:
    """The top left token of each cell of 2 x 2 in a square picture (ToMe for Stable Diffusion, without randomness).

    What an odd side leaves over is no cell: its tokens may go, and none of them receives.
    """
    side = round((tokens - leading) ** 0.5)
    return [leading + y * side + x for y in range(0, side - 1, 2) for x in range(0, side - 1, 2)]
