"""Which inputs of a model have a row for each sample of a call, and calls made of some of the rows.

An input without such rows (position ids, rotary tables, a schedule) is shared: whatever becomes of the rows, it stays
as it is. The input contract says which these are (``Context.signature``); where there is none, an input that has not as
many rows as the one that surely has them is shared. Two equal sizes prove nothing, so the contract goes first.

Calls are of tensors or of arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enginewright.ground.driver import some_rows
from enginewright.passes.contract import Context
from enginewright.passes.kernel.wrap import AroundByName, around

__all__ = ["Repeating", "one_call", "repeated_rows", "shared_inputs", "some_rows", "two_of_each"]


def shared_inputs(context: Context, example: Mapping[str, Tensor], *, like: str) -> tuple[str, ...]:
    """Names of the inputs that all rows of a call share, seen from a call whose input ``like`` has the rows.

    Those that steps added and a call may leave out are among them.
    """
    rows, shared = example[like].shape[:1], context.signature.shared
    seen = [name for name, value in example.items() if name in shared or value.shape[:1] != rows]
    return (*seen, *(name for name in shared if name not in example))


def one_call(calls: Sequence[Mapping[str, Tensor]], shared: Collection[str]) -> dict[str, Tensor]:
    """The rows of several calls in one; what rows share is that of the first call."""
    return {
        name: value if name in shared else torch.cat([call[name] for call in calls]) for name, value in calls[0].items()
    }


@dataclass(frozen=True, kw_only=True)
class Repeating(AroundByName):
    """Something around a model that may run it with all rows of a call several times over, one after the other."""

    copies: int = 1


def repeated_rows(model: nn.Module) -> int:
    """How often the rows of a call follow one another inside a model; mostly once."""
    found = around(model, Repeating)
    return found.copies if found else 1


def two_of_each(call: Mapping[str, Tensor], shared: Collection[str]) -> dict[str, Tensor]:
    """All rows, and after them all rows again."""
    return {name: value if name in shared else torch.cat([value, value]) for name, value in call.items()}
