"""What a pass may ask of a model, whatever its class: traits, and the families that answer for their layers.

A family is one file under ``passes/families/`` with a function ``recognise(module) -> Trait | None`` for each trait
it knows (named in its ``RECOGNISERS``). Families look at a layer's structure and import no model library.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from torch import nn

import passes.families


class HeadedAttention(ABC):
    """An attention layer whose heads can be told apart and taken out.

    Attributes:
        heads: number of heads.
        head_dim: width of a head; head h owns columns h*head_dim to (h+1)*head_dim of ``output``'s input.
        output: the projection that reads all heads' results.
    """

    heads: int
    head_dim: int
    output: nn.Linear

    @abstractmethod
    def keep_heads(self, kept: Sequence[int]) -> None:
        """Take every other head out: smaller matrices, and the layer's own counts set to match."""


@dataclass(frozen=True)
class FixedAttention:
    """An attention layer whose heads cannot be taken out, and why: what a pass reports instead of guessing."""

    reason: str


Trait = TypeVar("Trait")


def only(trait: type[Trait], recognise: Callable[[nn.Module], object]) -> Callable[[nn.Module], Trait | None]:
    """A recogniser of one trait, from a function that may answer with any of several."""

    def answer(module: nn.Module) -> Trait | None:
        found = recognise(module)
        return found if isinstance(found, trait) else None

    return answer


@cache
def families() -> tuple[object, ...]:
    """Every module under ``passes/families``, by name."""
    names = sorted(entry.name for entry in pkgutil.iter_modules(passes.families.__path__))
    return tuple(importlib.import_module(f"passes.families.{name}") for name in names)


def trait_of(module: nn.Module, trait: type[Trait]) -> Trait | None:
    """What the first family that knows this layer answers, or None."""
    for family in families():
        for recognise in family.RECOGNISERS.get(trait, ()):  # type: ignore[attr-defined]
            if (answer := recognise(module)) is not None:
                return answer  # type: ignore[no-any-return]
    return None


def layers_of(model: nn.Module, trait: type[Trait]) -> Iterator[tuple[str, Trait]]:
    """Each layer that has the trait, with its module path, in the model's order."""
    for path, module in model.named_modules():
        if (answer := trait_of(module, trait)) is not None:
            yield path, answer


def layer_at(model: nn.Module, path: str, trait: type[Trait]) -> Trait:
    """The layer at a path that a plan names."""
    answer = trait_of(model.get_submodule(path), trait)
    assert answer is not None, f"{path} lost its trait {trait.__name__} between plan and rewrite"
    return answer
