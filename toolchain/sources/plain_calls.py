"""A network of transformers as an exporter needs it: tensors by name go in, a tuple of tensors comes out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class PlainCall(nn.Module):
    """Wraps a network whose answer also holds caches, tuples or answers within answers; ``plain_call`` makes one.

    Args:
        inner: the network; an engine is put in its place.
        outputs: what is kept of its answer: keys, or places in a tuple.
        options: arguments that are the same in every call.
    """

    def __init__(self, inner: nn.Module, outputs: Sequence[str | int], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner, self.outputs, self.options = inner, tuple(outputs), dict(options)

    def ask(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Call the network and keep what is named."""
        answer = self.inner(**inputs, **self.options)
        return tuple(answer[key] for key in self.outputs)


def plain_call(
    inner: nn.Module, inputs: Sequence[str], outputs: Sequence[str | int], options: Mapping[str, Any]
) -> PlainCall:
    """A network that takes exactly ``inputs``, by name, and gives exactly ``outputs``."""
    return with_arguments(tuple(inputs))(inner, outputs, options).eval()


@functools.cache
def with_arguments(names: tuple[str, ...]) -> type[PlainCall]:
    """``PlainCall`` with a ``forward`` of these arguments: exporters read its signature."""

    def forward(self: PlainCall, *args: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        return self.ask(**dict(zip(names, args, strict=False)), **inputs)

    own = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return type("PlainCall", (PlainCall,), {"forward": forward, "__module__": __name__})
