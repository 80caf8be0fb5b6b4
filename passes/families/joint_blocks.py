"""How ``diffusers``' attention over image and text together answers: Stable Diffusion 3 and Flux.

Known by structure and by the processor's name, so that the library need not be there; checked against diffusers 0.42.
Image and text have projections of their own and attend to one another head by head, so a head goes in both. In Flux's
single blocks the output projection stands beside the attention and reads the feed-forward too: there the block answers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from enginewright.passes.kernel.surgery import ProjectedAttention, projected_attention
from enginewright.passes.traits import FixedAttention, HeadedAttention, Stream, only

PROCESSORS = {"JointAttnProcessor2_0", "FluxAttnProcessor"}
"""What computes the attention; both read the layer's own counts."""

OWN = ("to_q", "to_k", "to_v")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def attention(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``Attention`` of SD3 (its last block gives no text: no ``to_add_out``) and ``FluxAttention`` of double blocks."""
    layer: Any = module
    if not is_joint(module) or getattr(layer, "to_out", None) is None:
        return None
    joint = getattr(layer, "add_q_proj", None) is not None
    gives_text = getattr(layer, "to_add_out", None) is not None
    head_dim = layer.inner_dim // layer.heads
    return projected_attention(
        ProjectedAttention(
            core=module,
            inputs=(*(TEXT if joint else ()), *OWN),
            stacks=1,
            holder=layer.to_out,
            output_name="0",
            heads=layer.heads,
            head_dim=head_dim,
            counts=counts(layer, head_dim),
            text=Stream(value=(module, TEXT[-1]), output=(module, "to_add_out"), tokens="text") if gives_text else None,
        ),
        whole={"to_out", *norms_of_a_head(module, head_dim)},
    )


def single_block(module: nn.Module) -> HeadedAttention | FixedAttention | None:
    """``FluxSingleTransformerBlock``: ``proj_out`` reads the heads, then the hidden units of the feed-forward."""
    layer: Any = module
    if not all(hasattr(module, name) for name in ("attn", "proj_mlp", "proj_out", "mlp_hidden_dim")):
        return None
    core: Any = layer.attn
    if not is_joint(core) or getattr(core, "to_out", None) is not None:
        return None
    head_dim = core.inner_dim // core.heads
    return projected_attention(
        ProjectedAttention(
            core=core,
            inputs=OWN,
            stacks=1,
            holder=module,
            output_name="proj_out",
            heads=core.heads,
            head_dim=head_dim,
            counts=counts(core, head_dim),
            others=layer.mlp_hidden_dim,
            tokens="both",
        ),
        whole=norms_of_a_head(core, head_dim),
    )


def is_joint(module: nn.Module) -> bool:
    """Whether a module is an attention that one of the processors here computes."""
    found = all(hasattr(module, name) for name in (*OWN, "heads", "processor"))
    return found and type(module.processor).__name__ in PROCESSORS


def counts(layer: Any, head_dim: int) -> dict[str, int]:
    """The attributes that grow with the heads; Flux's class lacks two of them."""
    each = {"heads": 1, "sliceable_head_dim": 1, "inner_dim": head_dim, "inner_kv_dim": head_dim}
    return {name: grows for name, grows in each.items() if hasattr(layer, name)}


def norms_of_a_head(layer: nn.Module, head_dim: int) -> set[str]:
    """Names of norms of queries and keys that work within one head, whichever it is; they stay as they are."""
    found = {name: getattr(layer, name, None) for name in NORMS}
    shapes = {name: getattr(norm, "normalized_shape", getattr(norm, "dim", None)) for name, norm in found.items()}
    return {name for name, shape in shapes.items() if isinstance(shape, tuple) and tuple(shape) == (head_dim,)}


RECOGNISERS = {
    HeadedAttention: (only(HeadedAttention, attention), only(HeadedAttention, single_block)),
    FixedAttention: (only(FixedAttention, attention), only(FixedAttention, single_block)),
}
