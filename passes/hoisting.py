"""What a model says of work that a sampling run needs once: a prepare part gives it, a step part reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Hoisted:
    """Work that is done once for a run.

    Args:
        constant: inputs that stay the same over the run.
        modules: paths of outermost modules that read nothing else.
    """

    constant: tuple[str, ...]
    modules: tuple[str, ...]


def hoist(model: nn.Module, found: Hoisted) -> nn.Module:
    """Mark a model, in place; it computes what it did, and is exported as two graphs."""
    object.__setattr__(model, "hoisted", found)
    return model


def hoisted(model: nn.Module) -> Hoisted | None:
    """The mark of a model, if it has one."""
    found = getattr(model, "hoisted", None)
    return found if isinstance(found, Hoisted) else None
