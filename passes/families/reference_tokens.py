"""How the blocks of our own reference models run on fewer tokens."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from enginewright.passes.kernel.surgery import own_parts
from enginewright.passes.traits import TokenBlock, TokenStack

PARTS = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}


class AdaptiveBlock(TokenBlock):
    """DiT's block: two halves, each with shift, scale and gate from the condition c (B, D)."""

    def __init__(self, block: nn.Module, *inputs: Any, **named: Any) -> None:
        self.block = whole = cast(Any, block)
        (c,) = inputs or named.values()
        parts = whole.adaLN_modulation(c).chunk(6, dim=1)  # each (B, D)
        self.shift_a, self.scale_a, self.gate_a, self.shift_m, self.scale_m, self.gate_m = (p[:, None] for p in parts)

    def attention_input(self, x: Tensor) -> Tensor:
        """Norm, scale and shift."""
        return self.block.norm1(x) * (1 + self.scale_a) + self.shift_a

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the fused projection."""
        layer = self.block.attn
        qkv = layer.qkv(y).unflatten(-1, (3, layer.heads, layer.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def output(self, mixed: Tensor) -> Tensor:
        """The output projection."""
        return self.block.attn.proj(mixed)

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate and residual."""
        return x + self.gate_a * y

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """Norm, scale and shift."""
        return self.block.norm2(x) * (1 + self.scale_m) + self.shift_m

    def feed_forward(self, y: Tensor) -> Tensor:
        """The MLP."""
        return self.block.mlp(y)

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate and residual."""
        return x + self.gate_m * y


def stack(module: nn.Module) -> TokenStack | None:
    """``DiT``: ``blocks`` of exactly the parts that are known here, and patches that all come out again."""
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not hasattr(module, "x_embedder"):
        return None
    if any(set(own_parts(block)) != PARTS for block in blocks):
        return None
    attentions = [block.get_submodule("attn") for block in blocks]
    if any(set(own_parts(layer)) != {"qkv", "proj"} or not hasattr(layer, "head_dim") for layer in attentions):
        return None
    return TokenStack(holder=module, name="blocks", path="blocks", block=AdaptiveBlock, square=True, reads_all=True)


RECOGNISERS = {TokenStack: (stack,)}
