"""How the layers of ``diffusers`` answer; known by their structure, so that the library need not be there.

Checked against diffusers 0.42, whose ``Attention`` serves DiT, Stable Diffusion's U-Net and PixArt.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from passes.surgery import ProjectedAttention, projected_attention
from passes.traits import FixedAttention, HeadedAttention, only

PROCESSORS = {"AttnProcessor", "AttnProcessor2_0"}
"""What computes the attention is not a module: only these two are known to read the layer's own counts."""

NORMS = {"group_norm", "spatial_norm", "norm_cross"}
"""Norms of what comes in; they stand before the projections and never see a head."""


def attention(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``Attention``: ``to_q``, ``to_k``, ``to_v``, and ``to_out[0]`` that reads the heads.

    Query and key norms, projections of added text, fused projections and keys shared between heads are refused.
    """
    if not all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads", "processor")):
        return None
    layer: Any = module
    processor = type(layer.processor).__name__
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
        ),
        whole={"to_out", *NORMS},
    )


RECOGNISERS = {
    HeadedAttention: (only(HeadedAttention, attention),),
    FixedAttention: (only(FixedAttention, attention),),
}
