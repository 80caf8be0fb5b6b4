"""Adapters beside linear layers: a product of two matrices of low rank, and the layer that it merges into.

Source: LoRA, Hu et al. 2021, arXiv:2106.09685, section 4.1. How A starts is each method's own; here as a linear layer.

Shapes: B batch, N tokens, D_in and D_out features, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from enginewright.passes.kernel.surgery import share
from enginewright.passes.traits import AdaptedLayer


class Product(nn.Module):
    """A product B A of low rank, A (r, D_in) and B (D_out, r); B starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **like)  # A
        self.up = nn.Linear(rank, linear.out_features, bias=False, **like)  # B
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """X (B, N, D_in), scale one number or (B, N, 1) -> scale * B A x (B, N, D_out), scaled at the rank's width."""
        return self.up(self.down(x) * scale)

    def matrix(self) -> Tensor:
        """B A (D_out, D_in) in double precision."""
        return self.up.weight.detach().double() @ self.down.weight.detach().double()


class LowRank(nn.Module, AdaptedLayer):
    """A linear layer and a low-rank product beside it: W x + alpha B A x.

    Args:
        linear: W.
        product: B A.
        alpha: multiplies it.
        part: what the network calls the adapter that this is of.
    """

    def __init__(self, linear: nn.Linear, product: Product, alpha: float = 1.0, *, part: str = "") -> None:
        super().__init__()
        self.base = linear
        self.product = product
        self.alpha = alpha
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """X (B, N, D_in) -> (B, N, D_out)."""
        return self.base(x) + self.product(x, self.alpha)

    def merged(self, branch: str = "") -> nn.Linear:
        """The linear layer that computes the same; there is one branch."""
        del branch
        return with_added(self.base, self.alpha * self.product.matrix())


def with_added(linear: nn.Linear, delta: Tensor) -> nn.Linear:
    """A layer with ``delta`` (D_out, D_in) added to its weight in double precision, rounded once; same bias."""
    result = share(linear)
    assert isinstance(result, nn.Linear)
    weight = (linear.weight.detach().double() + delta).to(linear.weight.dtype)
    result.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    return result


def products(model: nn.Module) -> Iterator[Product]:
    """Every low-rank product of a model: all that is trained."""
    return (module for module in model.modules() if isinstance(module, Product))
