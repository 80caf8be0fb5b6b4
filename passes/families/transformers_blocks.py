"""How the layers of ``transformers`` answer; known by their structure, so that the library need not be there.

Checked against transformers 5.23: ViT's attention owns all four projections; BERT's owns three, and its output
projection stands beside it, so there the parent of both answers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from passes.surgery import ProjectedAttention, ProjectedFeedForward, projected_attention, projected_feed_forward
from passes.traits import BlockStack, FeedForward, FixedAttention, HeadedAttention, only


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
            gives="tensor and weights",
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
            gives="tensor and weights",
        )
    )


def feed_forward(module: nn.Module) -> FeedForward | None:
    """``ViTMLP`` and its like: ``fc1``, an activation, ``fc2``."""
    if not (hasattr(module, "fc1") and hasattr(module, "fc2") and hasattr(module, "activation_fn")):
        return None
    return projected_feed_forward(
        ProjectedFeedForward(layer=module, writers=((module, "fc1"),), stacks=1, reader=(module, "fc2"))
    )


def gated_feed_forward(module: nn.Module) -> FeedForward | None:
    """``LlamaMLP`` and its like: ``down_proj`` reads ``act(gate_proj(x)) * up_proj(x)``."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "intermediate_size")):
        return None
    return projected_feed_forward(
        ProjectedFeedForward(
            layer=module,
            writers=((module, "gate_proj"), (module, "up_proj")),
            stacks=1,
            reader=(module, "down_proj"),
            counts=((module, "intermediate_size"),),
        )
    )


def feed_forward_in_two(module: nn.Module) -> FeedForward | None:
    """``BertLayer``: ``intermediate.dense`` and its activation; ``output.dense`` reads, before dropout and norm."""
    writer, reader = getattr(module, "intermediate", None), getattr(module, "output", None)
    if not (isinstance(writer, nn.Module) and hasattr(writer, "dense")):
        return None
    if not (isinstance(reader, nn.Module) and hasattr(reader, "dense") and hasattr(module, "attention")):
        return None
    return projected_feed_forward(
        ProjectedFeedForward(
            layer=module,
            writers=((writer, "dense"),),
            stacks=1,
            reader=(reader, "dense"),
            chain=((module, "intermediate"), (reader, "dense")),
        )
    )


def stack(module: nn.Module) -> BlockStack | None:
    """A list of layers (``ViTLayer``, ``BertLayer``, ``LlamaDecoderLayer``), each with an attention of its own."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return None
    layers = list(module)
    alike = all(type(layer) is type(layers[0]) and type(layer).__name__.endswith("Layer") for layer in layers)
    attends = all(hasattr(layer, "attention") or hasattr(layer, "self_attn") for layer in layers)
    return BlockStack(module) if alike and attends else None


RECOGNISERS = {
    HeadedAttention: (only(HeadedAttention, attention), only(HeadedAttention, attention_beside_output)),
    FixedAttention: (only(FixedAttention, attention), only(FixedAttention, attention_beside_output)),
    FeedForward: (feed_forward, gated_feed_forward, feed_forward_in_two),
    BlockStack: (stack,),
}
