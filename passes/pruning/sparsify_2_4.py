"""Zero two of every four weights along a linear layer's inputs, the pattern that sparse tensor cores skip.

Sources: Mishra et al. 2021, arXiv:2104.08378, section 3, for the pattern and ``magnitude``; SparseGPT, Frantar and
Alistarh 2023, arXiv:2301.00774, algorithm 1 with section 3.4's pattern, for ``sparsegpt``: columns are taken one after
the other for all rows at once, of each four the two go whose removal costs the output least, and the columns that
follow make up for it. Departure: no weights are trained again.

Only NVIDIA GPUs from Ampere on, through the TensorRT targets, gain time from it. No CPU engine does: the zeros are
stored and multiplied like any other weight, and the model's parameters and multiply-accumulates stay what they were.

Shapes: K inputs, N outputs, R rows (all leading dimensions together).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, FREE_WEIGHTS, TWO_IN_FOUR_ZEROS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.patterns import PATTERN
from enginewright.passes.kernel.selection import check_patterns, excluded_by, other_matrices, refuse_meta
from enginewright.passes.kernel.surgery import linear_like, put_at
from enginewright.passes.pruning.factorize import products_of

DAMPING = 0.01
"""Of the mean of the diagonal of X^T X, added to the diagonal; the release's value."""
BLOCK = 128
"""Columns after which the rest of the weight is brought up to date."""


class SparseWeight(Decision):
    """The pattern of zeros that a weight gets."""

    arrays: ClassVar[Mapping[str, str]] = {"/weight": "the sparse weight (N, K), where it does not follow from the old"}

    pattern: Literal["2:4"] = Field(description="where the zeros lie: two of every four along the inputs")
    kept_norm: float = Field(description="L2 norm of the weight over what it was")


class SparseFacts(Facts):
    """How weights were chosen, and who gains."""

    method: str = Field(description="that was asked for")
    gains: str = Field(description="where sparse weights save time")


class Sparsify24(Pass):
    """2:4 sparse linear layers; faster on GPUs with sparse tensor cores, and no faster on any CPU."""

    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, FREE_WEIGHTS)
    establishes: ClassVar[tuple[Fact, ...]] = (TWO_IN_FOUR_ZEROS,)
    destroys: ClassVar[tuple[Fact, ...]] = (FREE_WEIGHTS,)
    looks_for: ClassVar[str] = "linear layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (SparseWeight,)
    facts: ClassVar[type[Facts]] = SparseFacts

    method: Literal["magnitude", "sparsegpt"] = Field(
        "magnitude", description="magnitude keeps the two largest of four; sparsegpt also needs calibration inputs"
    )
    smallest: int = Field(1024, ge=0, description="layers with fewer weights than this stay as they are")
    exclude: tuple[str, ...] = Field((), description="glob patterns of layer paths left alone")

    def plan(self, model: nn.Module, context: Context) -> Plan[SparseWeight]:
        """Choose layers; ``sparsegpt`` leaves their new weights in the plan, ``magnitude`` follows from the old ones.

        Raises ``ToolchainError`` for weights without values or that are not finite, for ``sparsegpt`` without
        calibration inputs, and for an ``exclude`` pattern that matches no linear layer.
        """
        if self.method == "sparsegpt":
            self.check_calibration(context, "method 'sparsegpt'", otherwise="take method = 'magnitude'")
        found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        skipped = {
            path: f"{type(module).__name__}: only linear layers become sparse"
            for path, module in model.named_modules()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        }
        skipped |= other_matrices(model, {*found, *skipped}, "only linear layers become sparse")
        check_patterns(self.exclude, [*found, *skipped], what="linear layer")
        skipped |= {path: reason for path, layer in found.items() if (reason := self.reason_to_skip(path, layer))}
        layers = {path: layer for path, layer in found.items() if path not in skipped}
        refuse_meta({path: [layer.weight] for path, layer in layers.items()}, "a decomposition")
        read = products_of(model, layers, context if self.method == "sparsegpt" else None)
        choice: dict[str, SparseWeight] = {}
        arrays: dict[str, Tensor] = {}
        for number, (path, layer, squares) in enumerate(read):
            context.say(number, len(layers), f"sparsifying {path}")
            weight = layer.weight.detach()
            if not weight.isfinite().all():
                raise ToolchainError("its weight is not finite", where=path)
            if self.method == "sparsegpt":
                if squares is None:
                    skipped[path] = "the calibration inputs never reach it"
                    continue
                arrays[f"{path}/weight"] = sparsegpt(weight, squares, where=path)
            norm = kept_norm(arrays[f"{path}/weight"] if self.method == "sparsegpt" else sparse(weight), weight)
            choice[path] = SparseWeight(pattern=PATTERN, kept_norm=norm)
        facts = SparseFacts(method=self.method, gains="time on GPUs with sparse tensor cores alone; none on a CPU")
        return Plan(choice=choice, skipped=skipped, facts=facts, arrays=arrays)

    def rewrite(self, model: nn.Module, plan: Plan[SparseWeight]) -> nn.Module:
        """Put a layer with the sparse weight in the place of each planned one.

        Raises ``ToolchainError`` when a layer has not the size that the plan was made for.
        """
        for path in plan.choice:
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear), f"{path} is no linear layer any more"
            old = layer.weight.detach()
            weight = plan.array(f"{path}/weight").to(old.device) if self.method == "sparsegpt" else sparse(old)
            if weight.shape != old.shape or old.shape[1] % 4:
                wanted = tuple(weight.shape)
                raise ToolchainError(f"the plan is for a weight {wanted}; this has {tuple(old.shape)}", where=path)
            bias = None if layer.bias is None else layer.bias.detach().clone()
            put_at(model, path, linear_like(layer, weight, bias))
        return model

    def reason_to_skip(self, path: str, layer: nn.Linear) -> str:
        """Why a layer stays as it is; empty when it does not."""
        if reason := excluded_by(path, self.exclude):
            return reason
        if not path:
            return "it is the whole model"
        if type(layer) is not nn.Linear:
            return f"it is a {type(layer).__name__}, not a plain Linear"
        if layer.in_features % 4:
            return f"its {layer.in_features} inputs are no multiple of 4"
        if layer.weight.numel() < self.smallest:
            return f"has {layer.weight.numel()} weights, fewer than {self.smallest}"
        return ""


def largest_two(score: Tensor) -> Tensor:
    """Which two of every four in a row are the largest (of equal ones, the first): (N, K) -> bool (N, K)."""
    four = score.unflatten(-1, (-1, 4))  # (N, K/4, 4)
    first = four.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(four, dtype=torch.bool).scatter(-1, first, True).flatten(-2)


def sparse(weight: Tensor) -> Tensor:
    """A weight (N, K) whose two smallest of every four in a row are zero."""
    return torch.where(largest_two(weight.abs()), weight, torch.zeros_like(weight))


def kept_norm(found: Tensor, weight: Tensor) -> float:
    """L2 norm of a sparse weight over that of the one it was made from."""
    kept, whole = (float(torch.linalg.vector_norm(w, dtype=torch.float64)) for w in (found, weight))
    return six_digits(kept / max(whole, 1e-300))


def sparsegpt(weight: Tensor, squares: Tensor, *, where: str) -> Tensor:
    """Algorithm 1 of SparseGPT on a weight (N, K), given X^T X (K, K) of its inputs."""
    w = weight.to(torch.float64, copy=True)
    if not squares.isfinite().all():
        raise ToolchainError("its inputs are not finite", where=where)
    dead = squares.diagonal() == 0
    w[:, dead] = 0  # an input that is always zero: its weights do nothing
    inverse = upper_inverse(squares, dead)
    columns = w.shape[1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros(len(w), end - start, dtype=w.dtype)
        keep = torch.zeros(len(w), end - start, dtype=torch.bool)
        for i in range(start, end):
            if i % 4 == 0:
                cost = (w[:, i : i + 4] / inverse.diagonal()[i : i + 4]).square()
                keep[:, i - start : i - start + 4] = largest_two(cost)
            pruned = torch.where(keep[:, i - start], w[:, i], torch.zeros_like(w[:, i]))
            error = (w[:, i] - pruned) / inverse[i, i]
            w[:, i:end] -= error[:, None] * inverse[i, i:end]
            w[:, i] = pruned
            errors[:, i - start] = error
        w[:, end:] -= errors @ inverse[start:end, end:]
    return w.to(weight.dtype)


def upper_inverse(squares: Tensor, dead: Tensor) -> Tensor:
    """The upper Cholesky factor (K, K) of the inverse of X^T X, damped."""
    h = squares.clone()
    h.diagonal()[dead] = 1
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
