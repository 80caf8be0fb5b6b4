"""How the layers of ``transformers`` answer; known by their structure, so that the library need not be there.

Checked against transformers 5.23: ViT's attention owns all four projections; BERT's owns three, and its output
projection stands beside it, so there the parent of both answers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from enginewright.passes.kernel.surgery import (
    ProjectedAttention,
    ProjectedFeedForward,
    projected_attention,
    projected_feed_forward,
)
from enginewright.passes.traits import BlockStack, FeedForward, FixedAttention, HeadedAttention, only


def attention(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``ViTAttention``, ``CLIPAttention``, ``LlamaAttention``: three projections, and one that reads the heads.

    Where keys and values have fewer heads than queries (Llama, Gemma, Mistral, Qwen), the query heads that share one
    go together.
    """
    if not all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "head_dim")):
        return None
    output = next((name for name in ("o_proj", "out_proj") if hasattr(module, name)), None)
    if output is None:
        return None
    layer: Any = module
    count = next((name for name in ("num_attention_heads", "num_heads") if hasattr(module, name)), None)
    queries, keys = (getattr(getattr(module, name), "out_features", 0) for name in ("q_proj", "k_proj"))
    each = queries // keys if keys and queries % keys == 0 else 1
    if count is not None and each > 1:
        return FixedAttention(f"it counts its heads, and {each} of them share a key")
    return projected_attention(
        ProjectedAttention(
            core=module,
            inputs=("q_proj", "k_proj", "v_proj"),
            stacks=1,
            holder=module,
            output_name=output,
            heads=queries // (layer.head_dim * each) if count is None else getattr(layer, count),
            head_dim=layer.head_dim * each,
            counts={} if count is None else {count: 1},
            gives="tensor and weights",
            shared={"k_proj": each, "v_proj": each} if each > 1 else {},
        ),
        whole=norms_of_a_head(module, layer.head_dim),
    )


def norms_of_a_head(layer: nn.Module, head_dim: int) -> set[str]:
    """Names of norms of queries and keys that work within one head, whichever it is (Gemma3, Qwen3)."""
    found = {name: getattr(layer, name, None) for name in ("q_norm", "k_norm")}
    return {
        name
        for name, norm in found.items()
        if tuple(getattr(getattr(norm, "weight", None), "shape", ())) == (head_dim,)
    }


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


def fused_attention(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``GPT2Attention``: ``c_attn`` stacks all queries, then all keys, then all values; ``c_proj`` reads the heads."""
    if not all(hasattr(module, name) for name in ("c_attn", "c_proj", "num_heads", "head_dim", "split_size")):
        return None
    layer: Any = module
    return projected_attention(
        ProjectedAttention(
            core=module,
            inputs=("c_attn",),
            stacks=3,
            holder=module,
            output_name="c_proj",
            heads=layer.num_heads,
            head_dim=layer.head_dim,
            counts={"num_heads": 1, "split_size": layer.head_dim},
            gives="tensor and weights",
        ),
        whole={name for name, _ in module.named_buffers(recurse=False)},  # the causal mask, in older releases
    )


def fused_feed_forward(module: nn.Module) -> FeedForward | None:
    """``GPT2MLP``: ``c_fc``, an activation, ``c_proj``."""
    if not (hasattr(module, "c_fc") and hasattr(module, "c_proj") and hasattr(module, "act")):
        return None
    return projected_feed_forward(
        ProjectedFeedForward(layer=module, writers=((module, "c_fc"),), stacks=1, reader=(module, "c_proj"))
    )


def feed_forward(module: nn.Module) -> FeedForward | None:
    """``ViTMLP``, ``VitDetMlp`` and their like: ``fc1``, an activation, ``fc2``."""
    if not (hasattr(module, "fc1") and hasattr(module, "fc2")):
        return None
    if not (hasattr(module, "activation_fn") or hasattr(module, "act")):
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
    """A list of layers (``ViTLayer``, ``BertLayer``, ``LlamaDecoderLayer``), each with an attention of its own.

    ``GPT2Block``, ``Qwen2VLVisionBlock`` and their like are known by their halves ``attn`` and ``mlp``.
    """
    if not isinstance(module, nn.ModuleList) or not len(module):
        return None
    layers = list(module)
    if all(hasattr(layer, "attn") and hasattr(layer, "mlp") for layer in layers):
        return BlockStack(module)
    alike = all(type(layer) is type(layers[0]) and type(layer).__name__.endswith("Layer") for layer in layers)
    attends = all(hasattr(layer, "attention") or hasattr(layer, "self_attn") for layer in layers)
    return BlockStack(module) if alike and attends else None


ATTENTIONS = (attention, attention_beside_output, fused_attention)

RECOGNISERS = {
    HeadedAttention: tuple(only(HeadedAttention, one) for one in ATTENTIONS),
    FixedAttention: tuple(only(FixedAttention, one) for one in ATTENTIONS),
    FeedForward: (feed_forward, gated_feed_forward, feed_forward_in_two, fused_feed_forward),
    BlockStack: (stack,),
}
