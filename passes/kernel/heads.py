"""Attention heads, for every pass that chooses among them: which layers cannot be cut, and the cut itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Decision
from enginewright.passes.kernel.observe import Look, evaluating, looking, tensors_in
from enginewright.passes.kernel.rows import repeated_rows
from enginewright.passes.kernel.selection import is_within, without_layout
from enginewright.passes.networks import networks_of, place_of, program_of
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


def held_in_state(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Layers whose heads cannot go because a sequence's state holds their keys and values, and that reason."""
    if not program_of(model).start:
        return {}
    return dict.fromkeys(layers, "a sequence's state holds its keys and values, one for each of its heads")


def on_other_rows(model: nn.Module, layers: Collection[str], context: Context) -> dict[str, str]:
    """Layers that run on other rows than those of a call (windows, groups, words of a patch), and how many.

    Seen from one call; where there is none, nothing is said.
    """
    example = context.example or next(iter(context.calibration), None)
    rowed = [tensor for name, tensor in (example or {}).items() if name not in context.signature.shared and tensor.ndim]
    if not example or not rowed:
        return {}
    own = {
        path: len(rowed[0]) * repeated_rows(network)
        for name, network in networks_of(model).items()
        for path in layers
        if is_within(path, place_of(model, name))
    }
    seen: dict[str, int] = {}

    def note(path: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        found = next(tensors_in([list(args), dict(named)]), None)
        if found is not None:
            seen[path] = len(found)

    looks = [Look(model.get_submodule(path), before=partial(note, path)) for path in layers]
    with torch.no_grad(), evaluating(model), looking(looks):
        model(**example)
    return {
        path: f"it runs on {count} rows where a call has {own[path]}, and each row of a call has a strength of its own"
        for path, count in seen.items()
        if count != own[path]
    }


def uncut(model: nn.Module, layers: Heads) -> dict[str, str]:
    """Layers that look like attention but cannot be cut, and why.

    A layer that no family knows is named by its class, unless it lies around or within one that has answered.
    """
    reasons = {path: fixed.reason for path, fixed in layers_of(model, FixedAttention)}
    return reasons | without_layout(model, (*layers, *reasons), ("attention",), "heads")
