"""Replace a linear layer by two narrower ones: the best approximation of its weight, or of its output, of lower rank.

Sources: the singular value decomposition (Eckart and Young 1936) for ``method = "weight"``; SVD-LLM, Wang et al. 2024,
arXiv:2403.07378, section 3.1, for ``method = "activation"``: W S is decomposed, where S S^T is the Cholesky
factorization of X^T X on calibration data, so that what is cut off is the error of the output. Departures: X^T X gets a
small multiple of the identity, because few rows leave it singular; no weights are updated afterwards.

The two factors are kept in the plan, so that a replay on another machine has the same bits.

Shapes: K inputs, N outputs, R rows (all leading dimensions together), r rank. K r + r N weights take the place of K N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, FREE_WEIGHTS, WHOLE_MATRICES, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import observe, reading, rounds
from enginewright.passes.kernel.selection import check_patterns, excluded_by, other_matrices, refuse_meta
from enginewright.passes.kernel.statistics import Products
from enginewright.passes.kernel.surgery import linear_like, put_at

DAMPING = 1e-4
"""Of the mean of the diagonal of X^T X, added to the diagonal."""


class LowRank(Decision):
    """The rank of a linear layer."""

    arrays: ClassVar[Mapping[str, str]] = {
        "/in": "the factor that reads the input (rank, K)",
        "/out": "the factor that gives the output (N, rank)",
    }

    rank: int = Field(description="that it gets")
    of: int = Field(description="that its weight can have at most")
    kept_norm: float = Field(description="share of the L2 norm of the singular values that is kept")


class FactorFacts(Facts):
    """How ranks were chosen."""

    method: str = Field(description="that was asked for")
    rank: str = Field(description="that was asked for")
    calibration_batches: int = Field(description="calls")


class Factorize(Pass):
    """Give linear layers a lower rank; a layer whose rank would save nothing stays."""

    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, FREE_WEIGHTS, WHOLE_MATRICES)
    destroys: ClassVar[tuple[Fact, ...]] = (WHOLE_MATRICES,)
    looks_for: ClassVar[str] = "linear layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (LowRank,)
    facts: ClassVar[type[Facts]] = FactorFacts

    method: Literal["weight", "activation"] = Field(
        "weight", description="what is approximated: the weight, or the layer's output on calibration inputs"
    )
    rank: Literal["budget", "energy", "fixed"] = Field(
        "budget", description="budget spends a share of the parameters; energy keeps a share of the squares"
    )
    share: float = Field(0.5, gt=0, lt=1, description="for rank=budget: parameters left of each layer's weight")
    energy: float = Field(0.95, gt=0, lt=1, description="for rank=energy: share of the squared singular values kept")
    fixed: int = Field(64, ge=1, description="for rank=fixed: the rank")
    smallest: int = Field(1024, ge=0, description="layers with fewer weights than this stay as they are")
    exclude: tuple[str, ...] = Field((), description="glob patterns of layer paths left alone")

    def plan(self, model: nn.Module, context: Context) -> Plan[LowRank]:
        """Decompose each layer on its own; the factors are the plan's arrays.

        Raises ``ToolchainError`` for weights without values or that are not finite, for ``activation`` without
        calibration inputs, and for an ``exclude`` pattern that matches no linear layer.
        """
        if self.method == "activation":
            self.check_calibration(context, "method 'activation'", otherwise="take method = 'weight'")
        found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        check_patterns(self.exclude, found, what="linear layer")
        skipped = other_matrices(model, found, "only linear layers are factorized")
        skipped |= {path: reason for path, layer in found.items() if (reason := self.reason_to_skip(path, layer))}
        layers = {path: layer for path, layer in found.items() if path not in skipped}
        refuse_meta({path: [layer.weight] for path, layer in layers.items()}, "a decomposition")
        read = products_of(model, layers, context if self.method == "activation" else None)
        choice: dict[str, LowRank] = {}
        arrays: dict[str, Tensor] = {}
        for number, (path, layer, squares) in enumerate(read):
            context.say(number, len(layers), f"decomposing {path}")
            if self.method == "activation" and squares is None:
                skipped[path] = "the calibration inputs never reach it"
                continue
            u, s, v = decompose(layer.weight.detach(), squares, where=path)
            rank, before, after = self.rank_of(s, layer), layer.weight.numel(), sum(layer.weight.shape)
            if rank * after >= before:
                skipped[path] = f"rank {rank} would need {rank * after} weights in place of {before}"
                continue
            kept = float((s[:rank].square().sum() / s.square().sum().clamp(min=1e-300)).sqrt())
            choice[path] = LowRank(rank=rank, of=min(layer.weight.shape), kept_norm=six_digits(kept))
            arrays[f"{path}/out"] = (u[:, :rank] * s[:rank]).to(layer.weight.dtype).contiguous()
            arrays[f"{path}/in"] = v[:rank].to(layer.weight.dtype).contiguous()
        facts = FactorFacts(method=self.method, rank=self.rank, calibration_batches=len(context.calibration))
        return Plan(choice=choice, skipped=skipped, facts=facts, arrays=arrays)

    def rewrite(self, model: nn.Module, plan: Plan[LowRank]) -> nn.Module:
        """Put the two factors in the place of each planned layer.

        Raises ``ToolchainError`` when a layer has not the size that the plan was made for.
        """
        for path in plan.choice:
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear), f"{path} is no linear layer any more"
            reads, writes = plan.array(f"{path}/in"), plan.array(f"{path}/out")
            if (writes.shape[0], reads.shape[1]) != tuple(layer.weight.shape):
                wanted, shape = (writes.shape[0], reads.shape[1]), tuple(layer.weight.shape)
                raise ToolchainError(f"the plan is for a weight of shape {wanted}; this one has {shape}", where=path)
            bias = None if layer.bias is None else layer.bias.detach().clone()
            device = layer.weight.device
            first = linear_like(layer, reads.to(device), None)
            put_at(model, path, nn.Sequential(first, linear_like(layer, writes.to(device), bias)).train(layer.training))
        return model

    def reason_to_skip(self, path: str, layer: nn.Linear) -> str:
        """Why a layer stays before it is looked into; empty when it does not."""
        if reason := excluded_by(path, self.exclude):
            return reason
        if not path:
            return "it is the whole model"
        if type(layer) is not nn.Linear:
            return f"it is a {type(layer).__name__}, not a plain Linear"
        if layer.weight.numel() < self.smallest:
            return f"has {layer.weight.numel()} weights, fewer than {self.smallest}"
        return ""

    def rank_of(self, s: Tensor, layer: nn.Linear) -> int:
        """The rank that a layer with these singular values gets, at least 1."""
        if self.rank == "fixed":
            return min(self.fixed, len(s))
        if self.rank == "budget":
            return max(math.floor(self.share * layer.weight.numel() / sum(layer.weight.shape)), 1)
        energies = s.square().cumsum(0)
        return int((energies < self.energy * energies[-1]).sum()) + 1


def products_of(
    model: nn.Module, layers: Mapping[str, nn.Linear], context: Context | None
) -> Iterator[tuple[str, nn.Linear, Tensor | None]]:
    """Each layer with X^T X (K, K) of its inputs over all rows of all calls; None where it never ran.

    As many layers are looked at in one run of the calls as fit into memory. Without a context nothing runs.
    """
    if context is None:
        yield from ((path, layer, None) for path, layer in layers.items())
        return
    sizes = {path: 8 * layer.in_features**2 for path, layer in layers.items()}
    for paths in rounds(sizes):
        products = {path: Products() for path in paths}
        looks = [reading(layers[path], products[path]) for path in paths]
        observe(model, looks, context, doing="reading inputs")
        for path in paths:
            yield path, layers[path], products.pop(path).total


def decompose(weight: Tensor, squares: Tensor | None, *, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """u (N, m), singular values s (m,), v (m, K) with weight = u diag(s) v; m = min(N, K).

    Given X^T X, s are those of the output X W^T, and v is turned back to read x itself.
    """
    w = weight.double()
    if not w.isfinite().all() or (squares is not None and not squares.isfinite().all()):
        raise ToolchainError("its weight or inputs are not finite", where=where)
    if squares is None:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return u, s, v
    size = max(float(squares.diagonal().mean()), 1e-12)
    factor = torch.linalg.cholesky(squares + DAMPING * size * torch.eye(len(squares), dtype=w.dtype))  # (K, K), lower
    u, s, v = torch.linalg.svd(w @ factor, full_matrices=False)
    return u, s, torch.linalg.solve_triangular(factor, v, upper=False, left=False)
