"""How the blocks of our own reference models run on fewer tokens."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from enginewright.passes.kernel.surgery import own_parts
from enginewright.passes.traits import (
    FusedAttention,
    ModulatedBlock,
    PatchNetwork,
    SelectingBlock,
    TokenBlock,
    TokenStack,
)

PARTS = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}
ROUTER = "token_selection"


class CallOfModulatedBlock(TokenBlock):
    """A ``ModulatedBlock`` called with the condition c (B, D)."""

    def __init__(self, block: nn.Module, *inputs: Any, **named: Any) -> None:
        self.block = whole = cast(Any, block)
        (c,) = inputs or named.values()
        self.shift_a, self.scale_a, self.gate_a, self.shift_m, self.scale_m, self.gate_m = whole.modulation(c)

    def attention_input(self, x: Tensor) -> Tensor:
        """Norm, scale and shift."""
        return self.block.norm1(x) * (1 + self.scale_a) + self.shift_a

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the fused projection."""
        return self.block.attn.heads_of(y)

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


class CallOfSelectingBlock(CallOfModulatedBlock):
    """A ``SelectingBlock`` called with the condition c (B, D)."""

    routed = True

    def token_logits(self, x: Tensor) -> Tensor:
        """Of the block's own."""
        logits: Tensor = self.block.token_logits(x)
        return logits

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The router's 1 or 0 for each token, gate and residual."""
        return x + self.block.token_selection(x) * (self.gate_m * y)


def stack(module: nn.Module) -> TokenStack | None:
    """A declared network of declared blocks, none of which holds anything else or attends in another way."""
    if not isinstance(module, PatchNetwork) or not len(module.blocks):
        return None
    selecting = all(isinstance(block, SelectingBlock) for block in module.blocks)
    parts = {*PARTS, ROUTER} if selecting else PARTS
    for block in module.blocks:
        if not isinstance(block, ModulatedBlock) or set(own_parts(block)) != parts:
            return None
        if not isinstance(block.attn, FusedAttention) or set(own_parts(block.attn)) != {"qkv", "proj"}:
            return None
    call = CallOfSelectingBlock if selecting else CallOfModulatedBlock
    return TokenStack(holder=module, name="blocks", path="blocks", block=call, square=True, reads_all=True)


RECOGNISERS = {TokenStack: (stack,)}
