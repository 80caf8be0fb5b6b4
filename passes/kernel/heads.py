"""Attention heads, for every pass that chooses among them: which layers cannot be cut, and the cut itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Json
from enginewright.passes.kernel.selection import without_layout
from enginewright.passes.traits import FixedAttention, HeadedAttention, layer_at, layers_of

Heads = Mapping[str, HeadedAttention]


def keep_heads(model: nn.Module, choice: Mapping[str, Json]) -> nn.Module:
    """Cut attention layers down to the heads that a plan keeps, in place.

    Args:
        model: has the layers.
        choice: by path the heads ``kept``, and ``of`` how many.

    Raises:
        ToolchainError: a layer has not the heads that the plan was made for.
    """
    for path, entry in choice.items():
        layer = layer_at(model, path, HeadedAttention)
        if layer.heads != entry["of"]:
            raise ToolchainError(
                f"the plan is for a layer of {entry['of']} heads; this one has {layer.heads}", where=path
            )
        layer.keep_heads(entry["kept"])
    return model


def uncut(model: nn.Module, layers: Heads) -> dict[str, str]:
    """Layers that look like attention but cannot be cut, and why.

    A layer that no family knows is named by its class, unless it lies around or within one that has answered.
    """
    reasons = {path: fixed.reason for path, fixed in layers_of(model, FixedAttention)}
    return reasons | without_layout(model, (*layers, *reasons), ("attention",), "heads")
