"""How the blocks of our own reference models run on fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from enginewright.passes.kernel.surgery import own_parts
from enginewright.passes.traits import (
    FusedAttention,
    ModulatedBlock,
    PatchNetwork,
    PlainBlock,
    SelectingBlock,
    TokenBlock,
    TokenStack,
)


class CallOfPlainBlock(TokenBlock):
    """A ``PlainBlock`` called with tokens alone: nothing is masked."""

    def __init__(self, block: nn.Module, *inputs: Any, **named: Any) -> None:
        self.block = cast(Any, block)

    def attention_input(self, x: Tensor) -> Tensor:
        """Norm."""
        return self.block.norm1(x)

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the fused projection."""
        return self.block.attn.heads_of(y)

    def output(self, mixed: Tensor) -> Tensor:
        """The output projection."""
        return self.block.attn.proj(mixed)

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual."""
        return x + y

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """Norm."""
        return self.block.norm2(x)

    def feed_forward(self, y: Tensor) -> Tensor:
        """The MLP."""
        return self.block.mlp(y)

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual."""
        return x + y


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
        """How much the block's own router wants each token to run."""
        logits: Tensor = self.block.token_logits(x)
        return logits

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The router's 1 or 0 for each token, gate and residual."""
        return x + self.block.token_selection(x) * (self.gate_m * y)


HALVES = {"norm1", "attn", "norm2", "mlp"}
KINDS: Mapping[type, tuple[type[TokenBlock], set[str]]] = {
    PlainBlock: (CallOfPlainBlock, HALVES),
    SelectingBlock: (CallOfSelectingBlock, HALVES | {"adaLN_modulation", "token_selection"}),
    ModulatedBlock: (CallOfModulatedBlock, HALVES | {"adaLN_modulation"}),
}
"""For each kind of declared block, the narrower first, how a call of it is taken apart and all that it may hold."""


def stack(module: nn.Module) -> TokenStack | None:
    """A declared network of declared blocks of one kind, none of which holds anything else or attends otherwise."""
    if not isinstance(module, PatchNetwork) or not len(module.blocks):
        return None
    kind = next((kind for kind in KINDS if all(isinstance(block, kind) for block in module.blocks)), None)
    if kind is None:
        return None
    call, parts = KINDS[kind]
    for block in module.blocks:
        attention = block.get_submodule("attn")
        if set(own_parts(block)) != parts or not isinstance(attention, FusedAttention):
            return None
        if set(own_parts(attention)) != {"qkv", "proj"}:
            return None
    return TokenStack(
        holder=module,
        name="blocks",
        path="blocks",
        block=call,
        leading=module.leading,
        square=True,
        reads_all=not module.leading,
    )


RECOGNISERS = {TokenStack: (stack,)}
