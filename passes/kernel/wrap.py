"""Put something around the forward of a module: its class and its paths stay, and it can be pickled and deep-copied.

A model is known by its class and its layers by their paths, so what a pass puts around a whole network or block is no
module of its own: it is an object on the module, which is called in the place of its forward.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any, TypeVar

from torch import Tensor, nn

Call = Callable[..., Any]
"""A forward that is bound to its module."""

A = TypeVar("A", bound="Around")


class Around(ABC):
    """What is called in the place of a module's forward, and calls that."""

    @property
    def adds(self) -> tuple[str, ...]:
        """Names of inputs that it takes beside the forward's own, by name; one that a caller leaves out is None."""
        return ()

    @property
    def removes(self) -> tuple[str, ...]:
        """Names of inputs of the forward that it gives itself, so that no caller does."""
        return ()

    @abstractmethod
    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """Answer a call of the module.

        Args:
            forward: the module's own, or that with what was put around it before.
            args: the call's.
            inputs: the call's.
        """

    def signature_of(self, own: inspect.Signature) -> inspect.Signature:
        """How the module is called with this around a forward of the signature ``own``."""
        kinds = inspect.Parameter
        kept = [each for each in own.parameters.values() if each.name not in self.removes]
        new = [kinds(name, kinds.KEYWORD_ONLY, default=None, annotation=Tensor) for name in self.adds]
        end = len(kept) - (bool(kept) and kept[-1].kind is kinds.VAR_KEYWORD)
        return own.replace(parameters=[*kept[:end], *new, *kept[end:]])


class AroundByName(Around):
    """The same around a module whose inputs are all given by name."""

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """Answer a call; raises ``TypeError`` for inputs without names."""
        if args:
            raise TypeError(f"{len(args)} inputs are given by position; this model takes all of them by name")
        return self.answer(forward, inputs)

    @abstractmethod
    def answer(self, forward: Call, inputs: dict[str, Any]) -> Any:
        """Answer a call of the module.

        Args:
            forward: the module's own, or that with what was put around it before.
            inputs: the call's; they may be changed.
        """

    def signature_of(self, own: inspect.Signature) -> inspect.Signature:
        """How the module is called: no input has a position."""
        found = super().signature_of(own)
        kept = [
            p.replace(kind=p.KEYWORD_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p
            for p in found.parameters.values()
        ]
        return found.replace(parameters=kept)


class Forward:
    """The forward of a module with something around it; it has the signature of what it does.

    Args:
        module: whose forward it is.
        around: what is called, the innermost first.
        own: the forward that was set on this module alone, if one was; None: that of its class.
    """

    def __init__(self, module: nn.Module, around: tuple[Around, ...], own: Call | None) -> None:
        self.module, self.around, self.own = module, around, own

    @property
    def innermost(self) -> Call:
        """The forward with nothing around it."""
        return self.own or partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Answer a call of the module."""
        call = self.innermost
        for each in self.around:
            call = partial(each.run, call)
        return call(*args, **inputs)

    @property
    def __signature__(self) -> inspect.Signature:
        """How the module is called now."""
        signature = inspect.signature(self.innermost)
        for each in self.around:
            signature = each.signature_of(signature)
        return signature

    @property
    def __code__(self) -> CodeType:
        """Where the module's own forward is written, which torch's exporter names in what it says."""
        return type(self.module).forward.__code__


def wrap(module: nn.Module, around: Around) -> None:
    """Put something around a module's forward, in place, outside of all that is around it already."""
    before = vars(module).get("forward")
    own = before.own if isinstance(before, Forward) else before
    module.forward = Forward(module, (*all_around(module), around), own)  # type: ignore[method-assign]


def all_around(module: nn.Module) -> tuple[Around, ...]:
    """What is around a module's forward, the innermost first."""
    forward = vars(module).get("forward")
    return forward.around if isinstance(forward, Forward) else ()


def around(module: nn.Module, kind: type[A]) -> A | None:
    """The outermost object of one kind around a module's forward."""
    return next((each for each in reversed(all_around(module)) if isinstance(each, kind)), None)
