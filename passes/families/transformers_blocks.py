"""How the layers of ``transformers`` answer; known by their structure, so that the library need not be there.

Checked against transformers 5.23: ViT's attention owns all four projections; BERT's owns three, and its output
projection stands beside it, so there the parent of both answers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from passes.surgery import ProjectedAttention, projected_attention
from passes.traits import FixedAttention, HeadedAttention, only


def attention(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``ViTAttention``: ``q_proj``, ``k_proj``, ``v_proj``, and ``o_proj`` that reads the heads."""
    if not all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")):
        return None
    layer: Any = module
    if not hasattr(module, "num_attention_heads"):
        return FixedAttention("it does not say how many heads it has")
    return projected_attention(
        ProjectedAttention(
            core=module,
            inputs=("q_proj", "k_proj", "v_proj"),
            stacks=1,
            holder=module,
            output_name="o_proj",
            heads=layer.num_attention_heads,
            head_dim=layer.head_dim,
            counts={"num_attention_heads": 1},
        )
    )


def attention_beside_output(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``BertAttention``: ``self`` owns ``query``, ``key`` and ``value``; ``output.dense`` reads the heads."""
    core: Any = getattr(module, "self", None)
    holder: Any = getattr(module, "output", None)
    names = ("query", "key", "value", "num_attention_heads", "attention_head_size", "all_head_size")
    if not (all(hasattr(core, name) for name in names) and hasattr(holder, "dense")):
        return None
    return projected_attention(
        ProjectedAttention(
            core=core,
            inputs=("query", "key", "value"),
            stacks=1,
            holder=holder,
            output_name="dense",
            heads=core.num_attention_heads,
            head_dim=core.attention_head_size,
            counts={"num_attention_heads": 1, "all_head_size": core.attention_head_size},
        )
    )


RECOGNISERS = {
    HeadedAttention: (only(HeadedAttention, attention), only(HeadedAttention, attention_beside_output)),
    FixedAttention: (only(FixedAttention, attention), only(FixedAttention, attention_beside_output)),
}
