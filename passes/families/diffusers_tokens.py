"""How the blocks of ``diffusers``' DiT run on fewer tokens; known by their structure.

Checked against diffusers 0.42.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from enginewright.passes.families.diffusers_blocks import PROCESSORS
from enginewright.passes.traits import TokenBlock, TokenStack

ABSENT = ("spatial_norm", "group_norm", "norm_q", "norm_k")
"""Parts of ``Attention`` that DiT does without."""


class BasicBlock(TokenBlock):
    """What every ``BasicTransformerBlock`` does alike: three projections, the one behind the heads, the MLP."""

    block: Any

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From three projections."""
        layer = self.block.attn1
        q, k, v = (
            part(y).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (layer.to_q, layer.to_k, layer.to_v)
        )
        return q, k, v

    def values(self, y: Tensor) -> Tensor:
        """From the third."""
        layer = self.block.attn1
        return layer.to_v(y).unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    def output(self, mixed: Tensor) -> Tensor:
        """The output projection."""
        return self.block.attn1.to_out[0](mixed)

    def feed_forward(self, y: Tensor) -> Tensor:
        """The MLP."""
        return self.block.ff(y)


class AdaptiveBlock(BasicBlock):
    """``BasicTransformerBlock`` with ``ada_norm_zero``, which embeds step and class on its own."""

    read_by_model: ClassVar[tuple[str, ...]] = ("norm1",)

    def __init__(self, block: nn.Module, *inputs: Any, **named: Any) -> None:
        assert not inputs, "DiTTransformer2DModel names all that it hands to a block"
        self.block = whole = cast(Any, block)
        norm = whole.norm1
        condition = norm.emb(named["timestep"], named["class_labels"], hidden_dtype=norm.linear.weight.dtype)
        parts = norm.linear(norm.silu(condition)).chunk(6, dim=1)  # each (B, D)
        self.shift_a, self.scale_a, self.gate_a, self.shift_m, self.scale_m, self.gate_m = (p[:, None] for p in parts)

    def attention_input(self, x: Tensor) -> Tensor:
        """Norm, scale and shift."""
        return self.block.norm1.norm(x) * (1 + self.scale_a) + self.shift_a

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate and residual."""
        return self.gate_a * y + x

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """Norm, scale and shift."""
        return self.block.norm3(x) * (1 + self.scale_m) + self.shift_m

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate and residual."""
        return self.gate_m * y + x


def known(block: Any) -> bool:
    """Whether a block is DiT's, and its attention the plain one."""
    if getattr(block, "norm_type", None) != "ada_norm_zero" or getattr(block.norm1, "emb", None) is None:
        return False
    if block.attn2 is not None or block.pos_embed is not None or block._chunk_size is not None:
        return False
    layer = block.attn1
    plain = type(layer.processor).__name__ in PROCESSORS and layer.rescale_output_factor == 1
    return plain and not layer.residual_connection and all(getattr(layer, name) is None for name in ABSENT)


def stack(module: nn.Module) -> TokenStack | None:
    """``DiTTransformer2DModel``."""
    blocks = getattr(module, "transformer_blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not hasattr(module, "proj_out_1"):
        return None
    if not all(known(block) for block in blocks):
        return None
    name = "transformer_blocks"
    return TokenStack(holder=module, name=name, path=name, block=AdaptiveBlock, square=True, reads_all=True)


RECOGNISERS = {TokenStack: (stack,)}
