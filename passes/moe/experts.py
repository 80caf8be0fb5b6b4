"""A shared expert and routed ones: the layer that ``dense_to_moe`` puts in a feed-forward's place, in three forms.

Source: Dense2MoE 2025, section "Feed-forward to mixture of experts": y = shared(x) + sum over the top k of
gate_e(x) * expert_e(x). The forms compute the same: ``masked`` runs every expert on every token and is what the others
are tested against; ``capacity`` has fixed shapes, and drops what overflows; ``nonzero`` has shapes that depend on the
data, and drops nothing.

Shapes: B samples (the first dimension, always), N tokens of a sample, D width, E experts, h hidden units of an expert,
k experts of a token, C slots that an expert has for a sample, R rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from enginewright.passes.traits import FeedForward

Gate = Literal["softmax", "one"]
Form = Literal["capacity", "nonzero", "masked"]
Products = Literal["batched", "separate"]


def samples(x: Tensor) -> Tensor:
    """x (B, ..., D) -> (B, N, D); without dimensions between, each sample is one token."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def choose(logits: Tensor, top_k: int, gate: Gate) -> tuple[Tensor, Tensor]:
    """Logits (B, N, E) -> the chosen experts (B, N, k) and their gates (B, N, k).

    The softmax runs over all experts and is not normalised again over the chosen ones.
    """
    chosen = logits.topk(top_k, dim=-1).indices
    if gate == "one":
        return chosen, torch.ones_like(chosen, dtype=logits.dtype)
    return chosen, logits.softmax(-1).gather(-1, chosen)


def membership(chosen: Tensor, experts: int) -> Tensor:
    """Chosen experts (B, N, k) -> (B, N, E) int64, 1 where the token chose the expert."""
    return (chosen[..., None] == torch.arange(experts, device=chosen.device)).to(torch.int64).sum(2)


def passed_straight(gates: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
    """The gates (B, N, k), bit for bit, with the gradient of the router's shares (B, N, E) of the chosen experts.

    Bengio et al. 2013, arXiv:1308.3432, section 4: gates of one alone would teach a router nothing.
    """
    own = shares.gather(-1, chosen)
    return gates + (own - own.detach())


def imbalance(shares: Tensor, chosen: Tensor) -> Tensor:
    """E * sum over experts of f_e * P_e: 1 for an even load, k choices of E; up to E when all go to one expert.

    Fedus et al. 2021, arXiv:2101.03961, equation 4, over all tokens of a call; f_e is the share of the choices that
    fell on expert e, which is their share of the tokens for k = 1, P_e the mean of the router's softmax. Only P_e has a
    gradient.

    Args:
        shares: the router's softmax (B, N, E).
        chosen: experts of each token (B, N, k).
    """
    experts = shares.shape[-1]
    fallen = membership(chosen, experts).float().mean((0, 1)) / chosen.shape[-1]  # (E,)
    return experts * (fallen * shares.float().mean((0, 1))).sum()


def ranks(members: Tensor, chosen: Tensor) -> Tensor:
    """How many tokens of the sample before it chose the same expert: members (B, N, E), chosen (B, N, k) -> (B, N, k).

    A sum along the tokens in whole numbers: exact for any N, and cheaper than a triangular matrix for a large one.
    """
    return (members.cumsum(1) - members).gather(2, chosen)


class StackedLinear(nn.Module):
    """Linear layers of one shape side by side; holds weight (E, K, M) and bias (E, 1, M)."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        first = layers[0]
        trainable = first.weight.requires_grad
        # Transposed here, because an engine would do it in every call.
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]), trainable)
        self.bias: nn.Parameter | None = None
        if first.bias is not None:
            self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]), trainable)

    def forward(self, x: Tensor) -> Tensor:
        """x (E, R, K), or (1, R, K) for the same rows to all, -> (E, R, M)."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class SideBySide(nn.ModuleList):
    """Experts of their own plain layers: x (E, R, D) -> (E, R, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (E, R, D) -> (E, R, D)."""
        return torch.stack([expert(rows) for expert, rows in zip(self, x.unbind(0), strict=True)])


class MixtureOfExperts(nn.Module):
    """x (B, ..., D) -> (B, ..., D).

    Args:
        shared: what every token passes through; holds the output's bias.
        router: D -> E logits.
        top_k: experts that a token is given to; 0 leaves the shared expert alone.
        gate: what an expert's answer is multiplied with; ``one`` is what adds up to the dense layer.

    Attributes:
        learns: whether the router is being trained. Answers are the same; gates of one then hand the gradient of the
            softmax on, and each call leaves its ``balance_loss``. Nothing of both is computed otherwise.
        balance_loss: how unevenly the last call used the experts; None where nothing learns, and where a token is given
            to all of them or to none, because nothing can be balanced then.
    """

    def __init__(self, shared: nn.Module, router: nn.Linear, *, top_k: int, gate: Gate) -> None:
        super().__init__()
        self.shared, self.router, self.top_k, self.gate = shared, router, top_k, gate
        self.learns = False
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., D) -> (B, ..., D)."""
        y = self.shared(x)
        if not self.top_k:
            return y
        rows = samples(x)  # (B, N, D)
        logits = self.router(rows)
        chosen, gates = choose(logits, self.top_k, self.gate)
        if self.learns:
            gates = self.learning(logits.softmax(-1), chosen, gates)
        return y + self.routed(rows, chosen, gates).reshape(y.shape)

    def learning(self, shares: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Note the balance loss; the same gates (B, N, k), with a gradient."""
        if self.top_k < shares.shape[-1]:
            self.balance_loss = imbalance(shares, chosen)
        return passed_straight(gates, shares, chosen) if self.gate == "one" else gates

    @abstractmethod
    def routed(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """What the experts add: x (B, N, D), chosen (B, N, k), gates (B, N, k) -> (B, N, D)."""

    def extra_repr(self) -> str:
        """What the layer was set to."""
        return f"top_k={self.top_k}, gate={self.gate}"


class MaskedExperts(MixtureOfExperts):
    """Every expert runs on every token; a gate of 0 silences those that were not chosen."""

    def __init__(
        self, shared: nn.Module, parts: Sequence[nn.Module], router: nn.Linear, *, top_k: int, gate: Gate
    ) -> None:
        super().__init__(shared, router, top_k=top_k, gate=gate)
        self.experts = stacked(parts)

    def routed(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Tokens (B, N, D) -> what the experts make of them (B, N, D)."""
        size = self.router.out_features
        dense = gates.new_zeros(*gates.shape[:2], size).scatter(2, chosen, gates)  # (B, N, E)
        answers = self.experts(x.flatten(0, 1)[None])  # (E, B*N, D)
        return (answers * dense.flatten(0, 1).T[..., None]).sum(0).view(x.shape)


class CapacityExperts(MixtureOfExperts):
    """Every expert runs on C slots for each sample; a token beyond them gets nothing from that expert.

    No shape depends on the data. Exact where no more than C tokens of a sample choose the same expert; of more, the
    first C are served. A slot that nobody took holds some token, and nobody reads its answer.
    """

    def __init__(
        self,
        shared: nn.Module,
        parts: Sequence[nn.Module],
        router: nn.Linear,
        *,
        top_k: int,
        gate: Gate,
        capacity: int,
        products: Products,
    ) -> None:
        super().__init__(shared, router, top_k=top_k, gate=gate)
        self.experts = stacked(parts) if products == "batched" else SideBySide(parts)
        self.capacity = capacity

    def routed(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """B, N, D as above. Slots lie expert by expert, then sample by sample: an expert reads one block of rows."""
        batch, tokens, width = x.shape
        rank = ranks(membership(chosen, self.router.out_features), chosen)  # (B, N, k)
        served = rank < self.capacity
        slots = self.router.out_features * batch * self.capacity
        sample = torch.arange(batch, device=x.device)[:, None, None]
        slot = (chosen * batch + sample) * self.capacity + rank  # (B, N, k)
        token = (sample * tokens + torch.arange(tokens, device=x.device)[None, :, None]).expand_as(slot)
        # One place more than there are slots takes whoever came too late: a plain scatter, no addition.
        table = torch.zeros(slots + 1, dtype=torch.int64, device=x.device)
        table = table.scatter(0, torch.where(served, slot, slots).flatten(), token.flatten())[:-1]
        taken = x.reshape(-1, width).index_select(0, table).view(-1, batch * self.capacity, width)  # (E, B*C, D)
        answers = self.experts(taken).reshape(-1, width)  # (E*B*C, D)
        own = answers.index_select(0, torch.where(served, slot, 0).flatten()).view(*slot.shape, width)  # (B, N, k, D)
        return (own * (gates * served)[..., None]).sum(2)

    def extra_repr(self) -> str:
        """What the layer was set to."""
        return f"{super().extra_repr()}, capacity={self.capacity}"


class NonzeroExperts(MixtureOfExperts):
    """Every expert runs on the tokens that chose it, as many as they are: shapes depend on the data.

    The answers are not added up where they belong: they lie expert by expert, and each token gathers its own.
    """

    def __init__(
        self, shared: nn.Module, parts: Sequence[nn.Module], router: nn.Linear, *, top_k: int, gate: Gate
    ) -> None:
        super().__init__(shared, router, top_k=top_k, gate=gate)
        self.experts = nn.ModuleList(parts)

    def routed(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """B, N, D as above; all samples are routed together."""
        rows = x.flatten(0, 1)  # (B*N, D)
        members = membership(chosen, len(self.experts)).flatten(0, 1)[None]  # (1, B*N, E)
        answers = [
            expert(rows.index_select(0, torch.nonzero(members[0, :, number]).squeeze(1)))
            for number, expert in enumerate(self.experts)
        ]
        loads = members[0].sum(0)  # (E,)
        place = (loads.cumsum(0) - loads)[chosen] + ranks(members, chosen.flatten(0, 1)[None]).view(chosen.shape)
        own = torch.cat(answers).index_select(0, place.flatten()).view(*chosen.shape, x.shape[-1])  # (B, N, k, D)
        return (own * gates[..., None]).sum(2)


def expert_parts(layer: FeedForward, groups: Sequence[Sequence[int]]) -> list[nn.Module]:
    """A module x (..., D) -> (..., D) for each group of a layer's hidden units, all without the output's bias."""
    output = output_name(layer)
    parts = [layer.standalone(units) for units in groups]
    for part in parts:
        part.get_submodule(output).register_parameter("bias", None)
    return parts


def output_name(layer: FeedForward) -> str:
    """Where the output projection is in what ``standalone`` gives: alone among its linears, it reads hidden units."""
    found = [
        name
        for name, module in layer.standalone([0]).named_modules()
        if isinstance(module, nn.Linear) and module.in_features == 1
    ]
    assert len(found) == 1, f"output projections: {found}"
    return found[0]


def stacked(parts: Sequence[nn.Module]) -> nn.Module:
    """The first part, with every linear replaced by those of all parts: x (E or 1, R, D) -> (E, R, D).

    What stands between them works on each element, or cuts the last dimension, so that a leading one does no harm.
    """
    whole = parts[0]
    for name, module in list(whole.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            linears = [part.get_submodule(name) for part in parts]
            setattr(whole.get_submodule(owner), leaf, StackedLinear(linears))  # type: ignore[arg-type]
    return whole
