"""The one calibration loop: passes say which modules they look at, and all calls are made once, in evaluation mode.

What a look keeps is its own affair; ``statistics.py`` has what streams. Statistics of many layers need not be held at
once: ``rounds`` deals layers out so that those of one round fit into a bound, or a round is one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from enginewright.passes.contract import Context, Inputs
from enginewright.passes.kernel.statistics import rows_of

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]
"""From what a module is called with (positional, named); may give other positional arguments."""

After = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]
"""From what a module was called with and what it gave; what it gives, if anything, takes the result's place."""


class Statistic(Protocol):
    """What takes the rows (R, K) of one call after the other."""

    def add(self, x: Tensor) -> None:
        """Rows of one call."""


AT_ONCE = 2 * 1024**3
"""Bytes of statistics that are held at once, where one layer alone does not need more."""


@dataclass(frozen=True)
class Look:
    """What is called before and after each call of a module.

    Args:
        module: the one that is looked at.
        before: called first.
        after: called last; with ``always`` also where the call ends in an error.
        always: see ``after``.
    """

    module: nn.Module
    before: Before | None = None
    after: After | None = None
    always: bool = False


def first_argument(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a layer of one argument is called with, named or not."""
    return inputs[0] if inputs else next(iter(named.values()))


def reading(layer: nn.Module, *statistics: Statistic, columns: slice = slice(None)) -> Look:
    """A look that gives the rows of a layer's input (some columns of it) to statistics before each call."""

    def before(inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows = rows_of(first_argument(inputs, named))[:, columns]
        for statistic in statistics:
            statistic.add(rows)

    return Look(layer, before=before)


@contextmanager
def looking(looks: Iterable[Look]) -> Iterator[None]:
    """Have modules looked at in this block; they are as before afterwards."""
    hooks = []
    try:
        for look in looks:
            if look.before is not None:
                hooks.append(look.module.register_forward_pre_hook(entering(look.before), with_kwargs=True))
            if look.after is not None:
                after, always = leaving(look.after), look.always
                hooks.append(look.module.register_forward_hook(after, with_kwargs=True, always_call=always))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def entering(before: Before) -> Callable[..., Any]:
    """PyTorch's form of what is called before a module."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        others = before(inputs, named)
        return None if others is None else (others, named)

    return hook


def leaving(after: After) -> Callable[..., Any]:
    """PyTorch's form of what is called after a module."""
    return lambda _, inputs, named, output: after(inputs, named, output)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode in this block, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def calls_of(context: Context, doing: str) -> Iterator[Inputs]:
    """The calibration calls, in order, each with its progress."""
    total = len(context.calibration)
    for number, call in enumerate(context.calibration):
        context.say(number, total, doing)
        yield call
    context.say(total, total, doing)


def observe(
    model: nn.Module,
    looks: Iterable[Look],
    context: Context,
    *,
    doing: str,
    each: Callable[[Any], None] | None = None,
    gradients: bool = False,
) -> None:
    """Make every calibration call once, in evaluation mode, while some modules are looked at.

    Args:
        model: keeps its mode and gets no hook that stays.
        looks: which modules, and what is done there.
        context: has the calls, and is told of the progress.
        doing: what is done, for the progress.
        each: called with the output of each call.
        gradients: whether they can be taken.
    """
    with torch.set_grad_enabled(gradients), evaluating(model), looking(looks):
        for call in calls_of(context, doing):
            output = model(**call)
            if each is not None:
                each(output)
            del output  # with the graph behind it, before the next call is made


def rounds(sizes: Mapping[str, int], *, at_once: int | None = None) -> list[list[str]]:
    """Keys in order, in groups whose sizes (bytes) add up to at most ``at_once``; one alone may be larger."""
    bound = AT_ONCE if at_once is None else at_once
    found: list[list[str]] = []
    held = 0
    for key, size in sizes.items():
        if not found or held + size > bound:
            found.append([])
            held = 0
        found[-1].append(key)
        held += size
    return found


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of nested arguments or outputs: itself, or those of a tuple, list or mapping, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def floats_in(value: object) -> list[Tensor]:
    """The floating-point tensors of nested arguments or outputs, in order."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
