"""How the blocks of ``transformers``' ViT, DeiT and BERT run on fewer tokens; known by their structure.

Checked against transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from enginewright.passes.kernel.surgery import own_parts
from enginewright.passes.traits import TokenBlock, TokenStack

VIT_LAYER = {"attention", "layernorm_before", "layernorm_after", "mlp"}
VIT_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
BERT_LAYER = {"attention", "intermediate", "output"}
BERT_CORE = {"query", "key", "value"}


def split_heads(y: Tensor, heads: int) -> Tensor:
    """(B, N, H*head_dim) -> (B, H, N, head_dim)."""
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


class NormFirst(TokenBlock):
    """``ViTLayer``: a norm before each half."""

    def __init__(self, block: nn.Module, *inputs: Any, **named: Any) -> None:
        self.block: Any = block

    def attention_input(self, x: Tensor) -> Tensor:
        """Norm."""
        return self.block.layernorm_before(x)

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From three projections."""
        layer = self.block.attention
        q, k, v = (
            split_heads(part(y), layer.num_attention_heads) for part in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        return q, k, v

    def output(self, mixed: Tensor) -> Tensor:
        """The output projection."""
        return self.block.attention.o_proj(mixed)

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual."""
        return y + x

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """Norm."""
        return self.block.layernorm_after(x)

    def feed_forward(self, y: Tensor) -> Tensor:
        """The MLP."""
        return self.block.mlp(y)

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual."""
        return y + x


class NormLast(TokenBlock):
    """``BertLayer``: a norm after each residual. Its mask is one of padding: the same for every query."""

    def __init__(self, block: nn.Module, *inputs: Any, **named: Any) -> None:
        self.block: Any = block

    @classmethod
    def mask(cls, x: Tensor, *inputs: Any, **named: Any) -> Tensor | None:
        """From what eager attention (floats to add) or the fused one (true where seen) is given, (B, 1, N or 1, N)."""
        given: Tensor | None = inputs[0] if inputs else named.get("attention_mask")
        if given is None:
            return None
        row = given[:, :, :1]  # (B, 1, 1, N)
        if row.dtype != torch.bool:
            return row
        return torch.zeros_like(row, dtype=x.dtype).masked_fill(~row, torch.finfo(x.dtype).min)

    def attention_input(self, x: Tensor) -> Tensor:
        """The tokens as they are: norms come after the residual."""
        return x

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From three projections."""
        core = self.block.attention.self
        q, k, v = (split_heads(part(y), core.num_attention_heads) for part in (core.query, core.key, core.value))
        return q, k, v

    def output(self, mixed: Tensor) -> Tensor:
        """The output projection."""
        return self.block.attention.output.dense(mixed)

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual and norm."""
        return self.block.attention.output.LayerNorm(y + x)

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """The tokens as they are: norms come after the residual."""
        return x

    def feed_forward(self, y: Tensor) -> Tensor:
        """Two projections."""
        return self.block.output.dense(self.block.intermediate(y))

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual and norm."""
        return self.block.output.LayerNorm(y + x)


def vision(module: nn.Module) -> TokenStack | None:
    """``ViTModel``, ``DeiTModel``: ``layers``, and a class token in ``embeddings``."""
    layers, embeddings = getattr(module, "layers", None), getattr(module, "embeddings", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(embeddings, "cls_token"):
        return None
    if any(set(own_parts(layer)) != VIT_LAYER for layer in layers):
        return None
    attentions = [layer.get_submodule("attention") for layer in layers]
    if any(set(own_parts(a)) != VIT_ATTENTION or not hasattr(a, "num_attention_heads") for a in attentions):
        return None
    leading = 2 if hasattr(embeddings, "distillation_token") else 1
    return TokenStack(holder=module, name="layers", path="layers", block=NormFirst, leading=leading, square=True)


def text(module: nn.Module) -> TokenStack | None:
    """``BertModel``: ``encoder.layer``, without a decoder's mask or memory; its first token stands for all."""
    encoder: Any = getattr(module, "encoder", None)
    layers = getattr(encoder, "layer", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(module, "embeddings"):
        return None
    for layer in layers:
        core = getattr(getattr(layer, "attention", None), "self", None)
        if set(own_parts(layer)) != BERT_LAYER or getattr(layer, "is_decoder", True) or core is None:
            return None
        if set(own_parts(core)) != BERT_CORE or not hasattr(core, "num_attention_heads"):
            return None
    return TokenStack(holder=encoder, name="layer", path="encoder.layer", block=NormLast, leading=1, padded=True)


RECOGNISERS = {TokenStack: (vision, text)}
