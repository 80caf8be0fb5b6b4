"""Stacks of blocks in a model, and why a list of blocks is none any more after some passes."""

from __future__ import annotations

from torch import nn

from enginewright.passes.traits import BlockStack, layers_of


def stacks_of(model: nn.Module) -> tuple[dict[str, BlockStack], dict[str, str]]:
    """The stacks by path; and by path too, why the blocks of a list cannot be taken for one."""
    return dict(layers_of(model, BlockStack)), {
        path: reason
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (reason := why_no_stack(module))
    }


def why_no_stack(blocks: nn.ModuleList) -> str:
    """What a pass made of the blocks of a list, as the modules in their place say; empty where none did."""
    return next((reason for block in blocks if (reason := getattr(block, "why_no_stack", ""))), "")
