"""How our own reference models answer, whose classes declare what they are."""

from __future__ import annotations

from torch import nn

from enginewright.passes.kernel.surgery import (
    ProjectedAttention,
    ProjectedFeedForward,
    projected_attention,
    projected_feed_forward,
)
from enginewright.passes.traits import (
    BlockStack,
    DeclaredAttention,
    DeclaredFeedForward,
    FeedForward,
    FixedAttention,
    HeadedAttention,
    StreamBlock,
    only,
)


def attention(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """A declared attention layer."""
    if not isinstance(module, DeclaredAttention):
        return None
    return projected_attention(
        ProjectedAttention(
            core=module,
            inputs=tuple(module.writers),
            stacks=module.writers,
            holder=module,
            output_name=module.reader,
            heads=module.heads,
            head_dim=module.head_dim,
            counts={"heads": 1},
            crossed=module.crossed,
            gives="tensor",
            by_head=tuple(name for name in module.by_head if hasattr(module, name)),
        ),
        whole=module.kept_whole,
    )


def feed_forward(module: nn.Module) -> FeedForward | None:
    """A declared feed-forward."""
    if not isinstance(module, DeclaredFeedForward):
        return None
    writers = tuple((module, name) for name in module.writers)
    return projected_feed_forward(
        ProjectedFeedForward(layer=module, writers=writers, stacks=1, reader=(module, module.reader))
    )


def stack(module: nn.Module) -> BlockStack | None:
    """A list of blocks that declare themselves."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return None
    return BlockStack(module) if all(isinstance(block, StreamBlock) for block in module) else None


RECOGNISERS = {
    HeadedAttention: (only(HeadedAttention, attention),),
    FixedAttention: (only(FixedAttention, attention),),
    FeedForward: (feed_forward,),
    BlockStack: (stack,),
}
