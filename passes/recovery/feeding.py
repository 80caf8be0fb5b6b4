"""The calls that a student is trained on, the same for the same step whenever that step is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from enginewright.passes.contract import Inputs, digest_of
from enginewright.passes.kernel.rows import one_call

AT_ONCE = 16
"""Steps whose calls are drawn together, because a whole sampling run gives many."""


@dataclass
class Cycled:
    """Given calls, one after the other and again from the first."""

    calls: Sequence[Inputs]
    batch: int

    def __call__(self, step: int) -> list[Inputs]:
        """Calls of a step."""
        first = step * self.batch
        return [self.calls[i % len(self.calls)] for i in range(first, first + self.batch)]


@dataclass
class Generated:
    """Calls drawn anew for each step."""

    draw: Callable[[int, int], list[Inputs]]
    batch: int
    held: dict[int, list[Inputs]] = field(default_factory=dict)

    def __call__(self, step: int) -> list[Inputs]:
        """Calls of a step."""
        pool, place = divmod(step, AT_ONCE)
        if pool not in self.held:
            count = AT_ONCE * self.batch
            self.held = {pool: self.draw(count, pool * count)}
        return self.held[pool][place * self.batch : (place + 1) * self.batch]


def joined(calls: Sequence[Inputs], shared: Sequence[str] = ()) -> list[Inputs]:
    """As few calls as will do: those whose inputs all have as many rows, and rows of the same shapes, become one.

    Inputs that rows share (``passes/kernel/rows.py``) must be equal.
    """
    groups: dict[object, list[Inputs]] = {}
    for number, call in enumerate(calls):
        own = {name: tensor for name, tensor in call.items() if name not in shared}
        rows = {tensor.shape[0] if tensor.ndim else None for tensor in own.values()}
        same = tuple((name, digest_of(call[name])) for name in call if name in shared)
        shape = tuple((name, tensor.shape[1:]) for name, tensor in own.items())
        groups.setdefault((shape, same) if len(rows) == 1 and None not in rows else number, []).append(call)
    return [one_call(group, shared) if len(group) > 1 else group[0] for group in groups.values()]
