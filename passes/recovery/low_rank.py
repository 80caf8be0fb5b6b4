"""Train a product of two thin matrices instead of a weight, and merge it at the end.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1: W + (a/r) B A with B zero at the start; here a = r, so that the
factor is 1. Departure: A starts uniform within 1/sqrt(K), the spread of PyTorch's own linear layers.

Shapes: K inputs, N outputs, R rank.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from enginewright.passes.kernel.patterns import mask_of


class LowRank(nn.Module):
    """Adds B A to a weight (N, K)."""

    mask: Tensor | None

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        self.register_buffer("mask", mask_of(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Weight (N, K) -> (N, K); zeros of a 2:4 weight stay zero."""
        product = self.up @ self.down
        return weight + (product if self.mask is None else product * self.mask)


def adapt(model: nn.Module, names: list[str], rank: int) -> dict[str, nn.Parameter]:
    """Give these weights of linear layers an adapter each; what is to be trained, by name."""
    trained: dict[str, nn.Parameter] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        layer = model.get_submodule(owner)
        adapter = LowRank(getattr(layer, leaf).detach(), rank)
        parametrize.register_parametrization(layer, leaf, adapter)
        trained |= {f"{name}.down": adapter.down, f"{name}.up": adapter.up}
    return trained
