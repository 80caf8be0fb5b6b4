"""Inputs bound to constants: the values, a model that is called without them, and what depends on them alone.

What depends on a bound input is followed through every operation of one call, so nothing about the model's structure
is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from enginewright.ground.errors import ToolchainError, unknown
from enginewright.passes.contract import Context, Inputs, Json
from enginewright.passes.kernel.observe import After, Look, looking
from enginewright.passes.kernel.wrap import AroundByName, Call, wrap


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A constant in the place of an input.

    Args:
        value: a number, nested lists of them, or a tensor: what every row has.
        dtype: of the input, such as ``int64``.
        shape: of the input in the call that it was taken from.
        like: a kept input.
        shared: leading dimensions that the two have in common; the constant takes their sizes from it.
    """

    value: Json
    dtype: str
    shape: tuple[int, ...]
    like: str
    shared: int

    def tensor(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The constant for a call with these other inputs."""
        other = inputs[self.like]
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point and other.is_floating_point():
            dtype = other.dtype  # half precision reaches all floating inputs alike
        value = torch.as_tensor(self.value, dtype=dtype, device=other.device)
        return value.expand((*other.shape[: self.shared], *self.shape[self.shared :]))


def call_with(names: Iterable[str], context: Context, *, pass_name: str) -> Inputs:
    """A call to follow, which has these inputs.

    Raises ``ToolchainError`` where there is no call, and for an input that it has not.
    """
    example = next(iter(context.calibration), context.example)
    if not example:
        raise ToolchainError(f"{pass_name} follows one call of the model and got none")
    for name in names:
        if name not in example:
            raise unknown("input", name, example)
    return example


def bind(name: str, value: Json, example: Inputs, bound: Sequence[str]) -> Bound:
    """Describe a constant for an input of a model, seen from one call.

    Raises:
        ToolchainError: the value does not fit the input.
    """
    input = example[name]
    dtype = str(input.dtype).removeprefix("torch.")
    try:
        tensor = torch.tensor(value, dtype=torch.float64)
        fits = tensor.ndim < max(input.ndim, 1) and tensor.expand(input.shape).shape == input.shape
    except (RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ToolchainError(f"{name} is bound to {value!r}, which is no row of its shape {tuple(input.shape[1:])}")
    if not input.is_floating_point() and (tensor != tensor.round()).any():
        raise ToolchainError(f"{name} is bound to {value!r}; it takes whole numbers ({dtype})")
    kept = {other: call for other, call in example.items() if other not in bound}
    return placed(value, input, kept, most=input.ndim - tensor.ndim)


def placed(value: Any, input: Tensor, kept: Inputs, *, most: int) -> Bound:
    """A constant in the place of an input, which takes leading sizes, at most so many, from one that is kept."""
    common = {other: common_dimensions(input, call, most) for other, call in kept.items()}
    like = max(common, key=lambda other: common[other])
    dtype = str(input.dtype).removeprefix("torch.")
    return Bound(value=value, dtype=dtype, shape=tuple(input.shape), like=like, shared=common[like])


def common_dimensions(one: Tensor, other: Tensor, most: int) -> int:
    """How many leading dimensions, at most so many, are of one size."""
    count = 0
    for a, b in zip(one.shape[:most], other.shape, strict=False):
        if a != b:
            break
        count += 1
    return count


def call_without(model: nn.Module, bound: Mapping[str, Bound]) -> nn.Module:
    """Let a model be called without its bound inputs, in place; paths of its modules stay as they were."""
    wrap(model, Binding(bound))
    return model


@dataclass(frozen=True)
class Binding(AroundByName):
    """A model called with constants in the place of some inputs, and by name with the others."""

    bound: Mapping[str, Bound]

    @property
    def removes(self) -> tuple[str, ...]:
        """The bound inputs."""
        return tuple(self.bound)

    def answer(self, forward: Call, inputs: dict[str, Any]) -> Any:
        """Answer a call without the bound inputs."""
        return forward(**inputs, **{name: constant.tensor(inputs) for name, constant in self.bound.items()})


class Following(TorchDispatchMode):
    """Notes for every tensor whether it came from bound inputs, from others, or from both."""

    def __init__(self, bound: Sequence[Tensor], free: Sequence[Tensor]) -> None:
        super().__init__()
        self.sources: Any = WeakIdKeyDictionary()
        for tensors, mark in ((bound, "bound"), (free, "free")):
            for tensor in tensors:
                self.sources[tensor] = frozenset({mark})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; what it gives or writes into comes from all that it read."""
        result = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marks = frozenset().union(*(self.of(tensor) for tensor in read))
        written = read if func._schema.is_mutable else []
        for tensor in (*written, *(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))):
            self.sources[tensor] = self.of(tensor) | marks
        return result

    def of(self, tensor: Tensor) -> frozenset[str]:
        """Where a tensor came from."""
        return self.sources.get(tensor, frozenset())


@dataclass
class Seen:
    """What one module gave whenever it was called, or why that is no constant.

    Attributes:
        value: with 1 for each leading size that follows its argument.
        follows: how many those are.
        reason: why there is no value.
    """

    value: Tensor | None = None
    follows: int = 0
    reason: str = ""


def constant_modules(model: nn.Module, inputs: Inputs, bound: Sequence[str]) -> dict[str, Seen]:
    """Outermost modules that only ever depend on bound inputs, by path, from one call with all inputs."""
    held = {name: tensor.clone() for name, tensor in inputs.items()}
    mode = Following([held[name] for name in bound], [t for name, t in held.items() if name not in bound])
    with torch.no_grad(), seeing(model, mode) as seen, mode:
        model(**held)
    constant = {path: entry for path, entry in seen.items() if path and entry is not None}
    return {path: entry for path, entry in constant.items() if not any(within(path, other) for other in constant)}


def within(path: str, other: str) -> bool:
    """Whether a module lies inside another."""
    return path.startswith(f"{other}.")


@contextmanager
def seeing(model: nn.Module, mode: Following) -> Iterator[dict[str, Seen | None]]:
    """By path, what each module gave; None for one that depends on other inputs or on none."""
    seen: dict[str, Seen | None] = {}

    def look(path: str) -> After:
        def after(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            marks = frozenset().union(*(mode.of(tensor) for tensor in tensors))
            if marks != {"bound"} or (path in seen and seen[path] is None):
                seen[path] = None
                return
            first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            now = shortened(result, first)
            before = seen.get(path)
            seen[path] = now if before is None else agreed(before, now)

        return after

    with looking(Look(module, after=look(path)) for path, module in model.named_modules() if path):
        yield seen


def agreed(before: Seen, now: Seen) -> Seen:
    """Two calls of one module, if they gave the same."""
    if before.value is None or now.value is None:
        return before if before.value is None else now
    same = before.follows == now.follows and torch.equal(before.value, now.value)
    return before if same else Seen(reason="its calls give different values")


def shortened(result: Any, argument: Tensor | None) -> Seen:
    """A value whose leading dimensions that follow the argument's sizes, and hold one value, are cut to 1."""
    if not isinstance(result, Tensor):
        return Seen(reason=f"it gives a {type(result).__name__}, not a tensor")
    value, follows = result.detach(), 0
    for size in () if argument is None else argument.shape[: value.ndim]:
        first = value.narrow(follows, 0, 1)
        if value.shape[follows] != size or not torch.equal(first.expand_as(value), value):
            break
        value, follows = first, follows + 1
    return Seen(value=value.clone(), follows=follows)


class Constant(nn.Module):
    """What a module gave, whatever it is called with.

    Args:
        value: as ``shortened`` gives it.
        follows: how many leading dimensions follow the first tensor that comes in.
    """

    value: Tensor

    def __init__(self, value: Tensor, follows: int) -> None:
        super().__init__()
        self.follows = follows
        self.register_buffer("value", value)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The value, as large as what comes in asks."""
        if not self.follows:
            return self.value
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return self.value.expand((*first.shape[: self.follows], *self.value.shape[self.follows :]))
