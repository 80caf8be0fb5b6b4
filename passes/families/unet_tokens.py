"""How the transformer blocks of ``diffusers``' U-Nets run on fewer tokens; known by their structure.

Each level of a U-Net has transformers of its own (``Transformer2DModel``), and what merges tokens starts and ends
within one of them. A block attends to itself, then to the text, then feeds forward; the last two work on each token
alone. Checked against diffusers 0.42 (Stable Diffusion 1.5 and XL).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from enginewright.passes.families.diffusers_blocks import PROCESSORS
from enginewright.passes.families.diffusers_tokens import ABSENT, BasicBlock
from enginewright.passes.traits import TokenStack

INPUTS = (
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "cross_attention_kwargs",
    "class_labels",
)
"""What a block is called with beside the tokens, in order."""


class CrossBlock(BasicBlock):
    """``BasicTransformerBlock`` with plain layer norms; attention to the text belongs to the residual's step."""

    def __init__(self, block: nn.Module, *inputs: Any, **named: Any) -> None:
        self.block: Any = block
        given = {**dict(zip(INPUTS, inputs, strict=False)), **named}
        assert given.get("attention_mask") is None, "a mask over a picture's own tokens is not known here"
        assert not given.get("cross_attention_kwargs"), "image prompts and boxes are not known here"
        self.text, self.text_mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")

    def attention_input(self, x: Tensor) -> Tensor:
        """Norm."""
        return self.block.norm1(x)

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual, then attention to the text."""
        x = y + x
        if self.block.attn2 is None:
            return x
        text = self.block.attn2(self.block.norm2(x), encoder_hidden_states=self.text, attention_mask=self.text_mask)
        return text + x

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """Norm."""
        return self.block.norm3(x)

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual."""
        return y + x


def known(block: Any) -> bool:
    """Whether a block is one with plain layer norms, and its attention to itself the plain one."""
    if getattr(block, "norm_type", None) != "layer_norm" or getattr(block, "only_cross_attention", True):
        return False
    if block.pos_embed is not None or block._chunk_size is not None or hasattr(block, "fuser"):
        return False
    layer, text = block.attn1, block.attn2
    if text is not None and not text.is_cross_attention:
        return False  # it attends to the picture a second time
    plain = type(layer.processor).__name__ in PROCESSORS and layer.rescale_output_factor == 1
    return plain and not layer.residual_connection and all(getattr(layer, name) is None for name in ABSENT)


def stack(module: nn.Module) -> TokenStack | None:
    """``Transformer2DModel`` over the features of a picture: norm, projection, blocks, projection."""
    blocks = getattr(module, "transformer_blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not getattr(module, "is_input_continuous", False):
        return None
    if not all(known(block) for block in blocks):
        return None
    name = "transformer_blocks"
    return TokenStack(holder=module, name=name, path=name, block=CrossBlock, square=True, reads_all=True, level=True)


RECOGNISERS = {TokenStack: (stack,)}
