"""How our own reference blocks answer."""

from __future__ import annotations

from torch import nn

from enginewright.passes.kernel.surgery import (
    ProjectedAttention,
    ProjectedFeedForward,
    projected_attention,
    projected_feed_forward,
)
from enginewright.passes.traits import BlockStack, FeedForward, FixedAttention, HeadedAttention, StreamBlock, only


def attention(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``SelfAttention``: ``qkv`` stacks all queries, then all keys, then all values; ``proj`` reads the heads."""
    if not all(hasattr(module, name) for name in ("qkv", "proj", "heads", "head_dim")):
        return None
    return projected_attention(
        ProjectedAttention(
            core=module,
            inputs=("qkv",),
            stacks=3,
            holder=module,
            output_name="proj",
            heads=module.heads,  # type: ignore[arg-type]
            head_dim=module.head_dim,  # type: ignore[arg-type]
            counts={"heads": 1},
            gives="tensor",
        )
    )


def feed_forward(module: nn.Module) -> FeedForward | None:
    """``Mlp``: ``fc1``, an activation, ``fc2``."""
    if not all(hasattr(module, name) for name in ("fc1", "act", "fc2")):
        return None
    return projected_feed_forward(
        ProjectedFeedForward(layer=module, writers=((module, "fc1"),), stacks=1, reader=(module, "fc2"))
    )


def stack(module: nn.Module) -> BlockStack | None:
    """A list of blocks that declare themselves, or that have ``attn`` and ``mlp``."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return None
    fits = all(isinstance(block, StreamBlock) or (hasattr(block, "attn") and hasattr(block, "mlp")) for block in module)
    return BlockStack(module) if fits else None


RECOGNISERS = {
    HeadedAttention: (only(HeadedAttention, attention),),
    FixedAttention: (only(FixedAttention, attention),),
    FeedForward: (feed_forward,),
    BlockStack: (stack,),
}
