"""How the layers of ``diffusers`` answer; known by their structure, so that the library need not be there.

Checked against diffusers 0.42, whose ``Attention`` serves DiT, Stable Diffusion's U-Net and PixArt.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from enginewright.passes.families import joint_blocks
from enginewright.passes.kernel.surgery import (
    ProjectedAttention,
    ProjectedFeedForward,
    projected_attention,
    projected_feed_forward,
)
from enginewright.passes.traits import BlockStack, FeedForward, FixedAttention, HeadedAttention, only

PROCESSORS = {"AttnProcessor", "AttnProcessor2_0"}
"""What computes the attention is not a module: only these two are known to read the layer's own counts."""

NORMS = {"group_norm", "spatial_norm", "norm_cross"}
"""Norms of what comes in; they stand before the projections and never see a head."""


GATED = {"GEGLU", "SwiGLU"}
"""Activations whose projection writes each hidden unit twice: its value, and its gate."""


def attention(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``Attention``: ``to_q``, ``to_k``, ``to_v``, and ``to_out[0]`` that reads the heads.

    Query and key norms, projections of added text, fused projections and keys shared between heads are refused.
    """
    if not all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads", "processor")):
        return None
    layer: Any = module
    processor = type(layer.processor).__name__
    if processor in joint_blocks.PROCESSORS:
        return None
    if processor not in PROCESSORS:
        return FixedAttention(f"its processor {processor} may depend on the heads")
    if layer.to_k is None or layer.to_out is None:
        return FixedAttention("it lacks a key or an output projection of its own")
    width = layer.to_out[0].in_features if isinstance(layer.to_out[0], nn.Linear) else layer.inner_dim
    head_dim = width // layer.heads
    return projected_attention(
        ProjectedAttention(
            core=module,
            inputs=("to_q", "to_k", "to_v"),
            stacks=1,
            holder=layer.to_out,
            output_name="0",
            heads=layer.heads,
            head_dim=head_dim,
            counts={"heads": 1, "sliceable_head_dim": 1, "inner_dim": head_dim, "inner_kv_dim": head_dim},
            crossed=bool(layer.is_cross_attention),
            gives=None if getattr(layer, "residual_connection", False) else "tensor",
        ),
        whole={"to_out", *NORMS},
    )


def feed_forward(module: nn.Module) -> FeedForward | None:
    """``FeedForward``: ``net[0]`` holds ``proj`` and the activation, gated (GEGLU, SwiGLU) or not; ``net[2]`` reads."""
    net: Any = getattr(module, "net", None)
    if not isinstance(net, nn.ModuleList) or len(net) < 3 or not isinstance(getattr(net[0], "proj", None), nn.Linear):
        return None
    return projected_feed_forward(
        ProjectedFeedForward(
            layer=module,
            writers=((net[0], "proj"),),
            stacks=2 if type(net[0]).__name__ in GATED else 1,
            reader=(net, "2"),
        )
    )


def fused_feed_forward(module: nn.Module) -> FeedForward | None:
    """Flux's single block: ``proj_mlp`` writes the hidden units; ``proj_out`` reads the attention, then them."""
    if not all(hasattr(module, name) for name in ("proj_mlp", "act_mlp", "proj_out", "mlp_hidden_dim", "attn")):
        return None
    layer: Any = module
    if not isinstance(layer.proj_out, nn.Linear):
        return None
    return projected_feed_forward(
        ProjectedFeedForward(
            layer=module,
            writers=((module, "proj_mlp"),),
            stacks=1,
            reader=(module, "proj_out"),
            first_column=layer.proj_out.in_features - layer.mlp_hidden_dim,
            chain=None,
            counts=((module, "mlp_hidden_dim"),),
        )
    )


def stack(module: nn.Module) -> BlockStack | None:
    """A list of transformer blocks that take and give the same streams."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return None
    blocks: list[Any] = list(module)
    alike = all(type(block) is type(blocks[0]) and type(block).__name__.endswith("Block") for block in blocks)
    attends = all(hasattr(block, "attn1") or hasattr(block, "attn") for block in blocks)
    if not (alike and attends):
        return None
    fixed = {
        i: "it ends the text stream" for i, block in enumerate(blocks) if getattr(block, "context_pre_only", False)
    }
    if getattr(getattr(blocks[0], "norm1", None), "emb", None) is not None:
        fixed[0] = "the output layer reads its embedding of the timestep"
    return BlockStack(module, fixed)


RECOGNISERS = {
    HeadedAttention: (only(HeadedAttention, attention),),
    FixedAttention: (only(FixedAttention, attention),),
    FeedForward: (feed_forward, fused_feed_forward),
    BlockStack: (stack,),
}
