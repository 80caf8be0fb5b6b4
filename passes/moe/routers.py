"""A router's first weights, from calibration inputs alone, and the loads that follow from them.

The paper trains its router from scratch. A router that says nothing would be useless before that, so these start from
what the dense layer does: ``fitted`` predicts by ridge regression how much larger than the others' each expert's answer
is; ``balanced`` then moves the biases until the experts' loads on the calibration inputs are even, as Wang et al. 2024,
arXiv:2408.15664, do during training (departures: steps in proportion to the excess load, which shrink).

Shapes: B samples, N tokens, D width, H hidden units of the dense layer, E experts, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from enginewright.passes.contract import Context
from enginewright.passes.moe.experts import Gate, choose, membership
from enginewright.passes.moe.watching import watch
from enginewright.passes.traits import FeedForward

RIDGE = 1e-3
"""Of the inputs' mean square."""

ROWS = 2048
"""Rows of a call that are worked on at once, and that are kept for balancing."""

STEPS = 200


@dataclass(frozen=True)
class Groups:
    """Which expert owns each hidden unit of a layer.

    Args:
        experts: the units of each.
        owner: (H,) number of the expert, or the number of experts for the shared one.
    """

    experts: Sequence[Sequence[int]]
    owner: Tensor

    @staticmethod
    def of(experts: Sequence[Sequence[int]], hidden: int) -> Groups:
        """From the experts' units."""
        owner = torch.full((hidden,), len(experts), dtype=torch.long)
        for number, units in enumerate(experts):
            owner[list(units)] = number
        return Groups(experts, owner)


@dataclass
class Moments:
    """Sums over rows from which a linear least-squares fit of T on X follows, both centred."""

    rows: int = 0
    x: Tensor | float = 0.0
    t: Tensor | float = 0.0
    xx: Tensor | float = 0.0
    xt: Tensor | float = 0.0
    tt: Tensor | float = 0.0

    def add(self, x: Tensor, t: Tensor) -> None:
        """Rows of x (R, D) and t (R, E)."""
        x, t = x.double(), t.double()
        self.rows += len(x)
        self.x, self.t = self.x + x.sum(0), self.t + t.sum(0)
        self.xx, self.xt, self.tt = self.xx + x.T @ x, self.xt + x.T @ t, self.tt + t.square().sum()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight (E, D) and bias (E,) that predict T, scaled so that its mean square is 1."""
        assert isinstance(self.x, Tensor), "no rows were added"
        assert isinstance(self.t, Tensor)
        x, t = self.x / self.rows, self.t / self.rows
        xx = self.xx / self.rows - torch.outer(x, x)
        xt = self.xt / self.rows - torch.outer(x, t)
        xx += RIDGE * (xx.diagonal().mean() + 1e-12) * torch.eye(len(x), dtype=xx.dtype)
        weight = torch.linalg.solve(xx, xt).T
        scale = (self.tt / self.rows / len(t)) ** 0.5 + 1e-12
        return weight / scale, (t - weight @ x) / scale


def fit(
    model: nn.Module, layers: Mapping[str, FeedForward], groups: Mapping[str, Groups], context: Context
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight (E, D) and bias (E,) of a router by layer path: ridge regression on the norms of the experts' answers."""
    moments = {path: Moments() for path in layers}

    def see(path: str, x: Tensor, units: Tensor) -> None:
        for rows, hidden in zip(x.flatten(0, 1).split(ROWS), units.flatten(0, 1).split(ROWS), strict=True):
            norms = answer_norms(layers[path], groups[path], hidden)
            moments[path].add(rows, norms - norms.mean(1, keepdim=True))

    watch(model, layers, context, see, doing="fitting routers")
    return {path: found.solve() for path, found in moments.items() if found.rows}


def answer_norms(layer: FeedForward, groups: Groups, hidden: Tensor) -> Tensor:
    """Length (R, E) of each expert's answer, from the hidden units (R, H)."""
    weight = layer.output.weight  # (D, H)
    return torch.stack([(hidden[:, units] @ weight[:, units].T).norm(dim=1) for units in groups.experts], dim=1)


def balance(
    model: nn.Module,
    layers: Mapping[str, FeedForward],
    routers: Mapping[str, tuple[Tensor, Tensor]],
    context: Context,
    *,
    top_k: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The same routers with biases under which all experts are chosen about as often."""
    logits: dict[str, list[Tensor]] = {path: [] for path in routers}

    def see(path: str, x: Tensor, units: Tensor) -> None:
        rows = x.flatten(0, 1)
        rows = rows[:: -(-len(rows) // ROWS)].double()
        logits[path].append(rows @ routers[path][0].T)

    watch(model, {path: layers[path] for path in routers}, context, see, doing="balancing routers")
    return {
        path: (weight, even_bias(torch.cat(logits[path]), bias, top_k=top_k))
        for path, (weight, bias) in routers.items()
    }


def even_bias(logits: Tensor, bias: Tensor, *, top_k: int) -> Tensor:
    """Move a bias (E,) until the top k of logits (R, E) plus bias hit every expert about as often; the best one met."""
    experts = logits.shape[1]
    best, least = bias, float("inf")
    for step in range(STEPS):
        loads = (logits + bias).topk(top_k, dim=1).indices.flatten().bincount(minlength=experts)
        excess = loads * (experts / loads.sum()) - 1  # 0 for an even share
        if float(excess.max()) < least:
            best, least = bias, float(excess.max())
        bias = bias - 0.5 * 0.98**step * excess
    return best


@dataclass
class Loads:
    """How many tokens of each calibration sample chose each expert.

    Args:
        tokens: most tokens of a sample.
        counts: (samples, E) of each call.
    """

    tokens: int = 0
    counts: list[Tensor] = field(default_factory=list)

    def add(self, chosen: Tensor, experts: int) -> None:
        """Choices (B, N, k) of one call."""
        self.tokens = max(self.tokens, chosen.shape[1])
        self.counts.append(membership(chosen, experts).sum(1))

    def all(self) -> Tensor:
        """(samples, E)."""
        return torch.cat(self.counts)

    def capacity(self, *, drop: float, headroom: float) -> int:
        """Fewest slots with an overflow of ``drop`` at most, times ``headroom``, up to eights; no more than tokens."""
        fewest = next(slots for slots in range(self.tokens + 1) if self.overflow(slots) <= drop)
        return min(8 * max(math.ceil(fewest * headroom / 8), 1), self.tokens)

    def overflow(self, capacity: int) -> float:
        """The share of choices that find no slot."""
        loads = self.all()
        return float((loads - capacity).clamp(min=0).sum()) / max(int(loads.sum()), 1)


def measure_loads(
    model: nn.Module,
    layers: Mapping[str, FeedForward],
    groups: Mapping[str, Groups],
    routers: Mapping[str, tuple[Tensor, Tensor]],
    context: Context,
    *,
    top_k: int,
    gate: Gate,
) -> dict[str, Loads]:
    """Loads of every layer while all layers are routed: the dense layers run with their hidden units masked."""
    found: dict[str, Loads] = {}

    def see(path: str, x: Tensor, units: Tensor) -> Tensor:
        weight, bias = (tensor.to(x) for tensor in routers[path])
        chosen, gates = choose(x @ weight.T + bias, top_k, gate)
        found.setdefault(path, Loads()).add(chosen, len(bias))
        return units * unit_gates(groups[path].owner, chosen, gates)

    watch(model, {path: layers[path] for path in routers}, context, see, doing="measuring loads")
    return found


def unit_gates(owner: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """What each hidden unit is multiplied with: owner (H,), chosen and gates (B, N, k) -> (B, N, H)."""
    experts = int(owner.max())
    dense = gates.new_zeros(*gates.shape[:2], experts).scatter(2, chosen, gates)
    return torch.cat([dense, dense.new_ones(*gates.shape[:2], 1)], dim=2)[..., owner]
