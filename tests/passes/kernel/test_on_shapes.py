"""Calls on shapes alone leave nothing behind: a later real call computes with real tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.passes.contract import macs
from enginewright.passes.kernel.on_shapes import on_shapes


def cached_like_transformers(function: Any) -> Any:
    """A cache behind a wrapper, as ``compile_compatible_method_lru_cache`` makes."""
    cache = functools.lru_cache(maxsize=8)(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return cache(*args)

    return wrapper


@functools.lru_cache(maxsize=8)
def steps(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32)


class Remembers(nn.Module):
    """Keeps tensors from call to call in every way that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table: Tensor | None = None
        self.tables: dict[int, Tensor] = {}
        self.register_buffer("grid", torch.zeros(1))

    @cached_like_transformers
    def grown(self, size: int) -> Tensor:
        return torch.ones(size)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(4)
        if 4 not in self.tables:
            self.tables[4] = torch.ones(4)
            self.grid = torch.ones(4)
            self.late = torch.ones(4)
        found: Tensor = self.linear(x) + self.table + self.tables[4] + self.grid + self.grown(4) + steps(4) + self.late
        return found


def test_after_costs_are_counted_a_real_call_gives_numbers() -> None:
    steps.cache_clear()
    module = Remembers().eval()
    x = torch.randn(2, 4)
    assert macs(module, {"x": x}) == 2 * 4 * 4
    assert not hasattr(module, "late")
    with torch.no_grad():
        found = module(x)
    assert type(found) is Tensor
    torch.testing.assert_close(found, (module.linear(x) + 5 + torch.arange(4.0)).detach())


def test_what_was_remembered_before_stays() -> None:
    steps.cache_clear()
    module = Remembers().eval()
    with torch.no_grad():
        before = module(torch.ones(1, 4))
        table, cached = module.table, steps(4)
        with on_shapes(module):
            module(torch.ones(1, 4))
        assert module.table is table
        assert steps(4) is cached
        torch.testing.assert_close(module(torch.ones(1, 4)), before)
