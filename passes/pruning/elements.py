"""What can be left out of a transformer, one by one: feed-forwards, attention layers, their heads and hidden units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.kernel.selection import is_within
from enginewright.passes.kernel.surgery import Zeros, put_at
from enginewright.passes.pruning.hard_attention import HardAttention
from enginewright.passes.traits import BlockStack, FeedForward, HeadedAttention, layer_at, layers_of

Entry = dict[str, Any]
"""What happens to one layer: ``kind`` and ``of``, then ``whole``, ``removed`` (heads or hidden units) and ``hard``."""


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

    def entry(self) -> Entry:
        """Nothing happens."""
        return {"kind": self.kind, "of": self.of, "whole": False, "removed": [], "hard": 0}

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


def carry_out(model: nn.Module, choice: Mapping[str, Entry]) -> nn.Module:
    """Cut layers, take whole ones out and make attention hard, in place.

    Args:
        model: changed.
        choice: by the keys of elements, what happens to each.

    Raises:
        ToolchainError: a layer has not the parts that the choice was made for, or cannot be taken out whole.
    """
    for key, entry in choice.items():
        path = key.partition(":")[0]
        found = layer_of(model, path, entry["kind"])
        of = found.hidden if isinstance(found, FeedForward) else found.heads
        if of != entry["of"]:
            raise ToolchainError(f"the plan is for a layer of {entry['of']} parts; this one has {of}", where=path)
        if entry["whole"]:
            remove(model, path, found)
            continue
        if entry["removed"]:
            keep(found, list(kept(entry)))
        if entry["hard"]:
            put_at(model, path, HardAttention(model.get_submodule(path), entry["hard"]))
    return model


def layer_of(model: nn.Module, path: str, kind: str) -> FeedForward | HeadedAttention:
    """The layer that an entry is about."""
    return layer_at(model, path, FeedForward) if kind == "ffn" else layer_at(model, path, HeadedAttention)


def kept(entry: Entry) -> Iterator[int]:
    """Heads or hidden units that stay."""
    gone = set(entry["removed"])
    return (i for i in range(entry["of"]) if i not in gone)


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
