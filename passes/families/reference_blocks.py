"""How our own reference blocks answer."""

from __future__ import annotations

from torch import nn

from passes.surgery import ProjectedAttention, projected_attention
from passes.traits import FixedAttention, HeadedAttention, only


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
        )
    )


RECOGNISERS = {
    HeadedAttention: (only(HeadedAttention, attention),),
    FixedAttention: (only(FixedAttention, attention),),
}
