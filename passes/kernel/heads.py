"""Attention heads, for every pass that chooses among them: which layers cannot be cut, and the cut itself."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Decision
from enginewright.passes.kernel.selection import without_layout
from enginewright.passes.traits import FixedAttention, HeadedAttention, layer_at, layers_of

Heads = Mapping[str, HeadedAttention]


class KeptHeads(Decision):
    """The heads that an attention layer keeps."""

    kept: tuple[int, ...] = Field(description="heads that stay, rising from 0")
    removed: tuple[int, ...] = Field(description="heads that go, rising")
    of: int = Field(description="heads that the layer has")


def keep_heads(model: nn.Module, choice: Mapping[str, KeptHeads]) -> nn.Module:
    """Cut attention layers down to the heads that a plan keeps, in place.

    Args:
        model: has the layers.
        choice: by path the heads that stay.

    Raises:
        ToolchainError: a layer has not the heads that the plan was made for.
    """
    for path, heads in choice.items():
        layer = layer_at(model, path, HeadedAttention)
        if layer.heads != heads.of:
            raise ToolchainError(f"the plan is for a layer of {heads.of} heads; this one has {layer.heads}", where=path)
        layer.keep_heads(heads.kept)
    return model


def uncut(model: nn.Module, layers: Heads) -> dict[str, str]:
    """Layers that look like attention but cannot be cut, and why.

    A layer that no family knows is named by its class, unless it lies around or within one that has answered.
    """
    reasons = {path: fixed.reason for path, fixed in layers_of(model, FixedAttention)}
    return reasons | without_layout(model, (*layers, *reasons), ("attention",), "heads")
