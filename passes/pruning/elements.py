"""What can be left out of a transformer, one by one: feed-forwards, attention layers, their heads and hidden units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Decision
from enginewright.passes.kernel.selection import is_within
from enginewright.passes.kernel.surgery import Zeros, put_at
from enginewright.passes.pruning.hard_attention import HardAttention
from enginewright.passes.traits import BlockStack, FeedForward, HeadedAttention, layer_at, layers_of


class CutLayer(Decision):
    """What is left out of one layer."""

    kind: Literal["ffn", "attention"] = Field(description="of layer: its parts are hidden units, or heads")
    of: int = Field(description="parts that the layer has")
    whole: bool = Field(False, description="whether all of it goes")
    removed: tuple[int, ...] = Field((), description="parts that go, from 0")
    hard: int = Field(0, description="probabilities that each query of an attention keeps; 0: all")


@dataclass(frozen=True)
class Element:
    """A layer that can be left out.

    Args:
        path: where the model has it.
        kind: a feed-forward, or an attention.
        of: its hidden units, or heads.
        shares_path: one module is both feed-forward and attention, as Flux's single blocks are.
    """

    path: str
    kind: Literal["ffn", "attention"]
    of: int
    shares_path: bool = False

    @property
    def key(self) -> str:
        """Its name in a plan: the path, and where two layers have the same one, the kind after a colon."""
        return f"{self.path}:{self.kind}" if self.shares_path else self.path

    def untouched(self) -> CutLayer:
        """Nothing is left out."""
        return CutLayer(kind=self.kind, of=self.of, whole=False, removed=(), hard=0)

    def parts(self, group: int) -> list[list[int]]:
        """Its heads, or groups of its hidden units."""
        size = group if self.kind == "ffn" else 1
        return [list(range(start, min(start + size, self.of))) for start in range(0, self.of, size)]


def elements_of(model: nn.Module) -> list[Element]:
    """Every element from the last block to the first; in each, feed-forwards before attention layers."""
    blocks = [f"{path}.{i}" for path, stack in layers_of(model, BlockStack) for i in range(len(stack.blocks))]
    ffn, attention = dict(layers_of(model, FeedForward)), dict(layers_of(model, HeadedAttention))
    found = [Element(path, "ffn", layer.hidden, path in attention) for path, layer in ffn.items()]
    found += [Element(path, "attention", layer.heads, path in ffn) for path, layer in attention.items()]
    place = {path: number for number, (path, _) in enumerate(model.named_modules())}

    def order(element: Element) -> tuple[int, bool, int]:
        around = [block for block in blocks if is_within(element.path, block)]
        return -place[max(around, key=len, default=element.path)], element.kind == "attention", -place[element.path]

    return sorted(found, key=order)


def carry_out(model: nn.Module, choice: Mapping[str, CutLayer]) -> nn.Module:
    """Cut layers, take whole ones out and make attention hard, in place.

    Args:
        model: changed.
        choice: by the keys of elements, what happens to each.

    Raises:
        ToolchainError: a layer has not the parts that the choice was made for, or cannot be taken out whole.
    """
    for key, what in choice.items():
        path = key.partition(":")[0]
        found = layer_of(model, path, what.kind)
        of = found.hidden if isinstance(found, FeedForward) else found.heads
        if of != what.of:
            raise ToolchainError(f"the plan is for a layer of {what.of} parts; this one has {of}", where=path)
        if what.whole:
            remove(model, path, found)
            continue
        if what.removed:
            keep(found, list(kept(what)))
        if what.hard:
            put_at(model, path, HardAttention(model.get_submodule(path), what.hard))
    return model


def layer_of(model: nn.Module, path: str, kind: str) -> FeedForward | HeadedAttention:
    """The layer that a decision is about."""
    return layer_at(model, path, FeedForward) if kind == "ffn" else layer_at(model, path, HeadedAttention)


def kept(what: CutLayer) -> Iterator[int]:
    """Heads or hidden units that stay."""
    gone = set(what.removed)
    return (i for i in range(what.of) if i not in gone)


def keep(layer: FeedForward | HeadedAttention, parts: Sequence[int]) -> None:
    """Take every other part out."""
    if isinstance(layer, FeedForward):
        layer.keep_hidden(parts)
    else:
        layer.keep_heads(parts)


def remove(model: nn.Module, path: str, layer: FeedForward | HeadedAttention) -> None:
    """Put zeros in the place of the whole layer; the residual and the norm around it stay."""
    if isinstance(layer, FeedForward):
        layer.replace_in(model, path, Zeros(layer.output.out_features))
    else:
        layer.silence(model, path)
