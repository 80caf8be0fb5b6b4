"""DyDiT: a DiT whose routers switch heads, hidden units and tokens off, as the timestep and the picture allow.

Sources: Zhao et al. 2024, arXiv:2410.03456, sections 3.2 (timestep-wise dynamic width) and 3.3 (spatial-wise dynamic
token); DyDiT++, arXiv:2504.06803. Checked against alibaba-damo-academy/DyDiT at commit 0ddc509: parameter names and
counts, the order of operations, the costs of a block, and masks and outputs with the same weights (relative error 1e-5
in float32). This is the masked form, which computes everything and multiplies by 0 what is off;
``slice_width_by_timestep`` and ``skip_spatial_tokens`` make the networks that save it.
``digits`` is ours: ``dit:digits``, trained further with its routers (``toolchain/training/dydit_digits.py``).

Shapes: B batch, N tokens, D width, H heads (and as many groups of neighbouring hidden units), T timesteps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.models.blocks.transformer import Mlp, SelfAttention
from enginewright.models.diffusion import dit
from enginewright.models.diffusion.dit import Config, inputs, modulate, realistic, task
from enginewright.passes.traits import RoutedWidth, SelectingBlock
from enginewright.sources.contract import Published

__all__ = ["FIGURES", "OUTPUTS", "PUBLISHED", "SHIPPED", "TINY", "DyDiT", "build", "inputs", "realistic", "task"]

PUBLISHED = {size: dit.PUBLISHED[size] for size in ("S/2", "B/2", "XL/2")}
SHIPPED = {"digits": dit.SHIPPED["digits"]}
TINY = dit.TINY
OUTPUTS = dit.OUTPUTS
FIGURES = {
    size: (Published(figure="parameter_count", value=count, source="the authors' code; position table included"),)
    for size, count in (("S/2", 33_120_740), ("B/2", 131_158_964), ("XL/2", 678_424_644))
}
"""The paper's multiply-accumulates are those of trained routers, and no figure of a size; a block's costs with
everything on are the constants of the authors' loss (``Block.macs``)."""
TEMPERATURE = 5.0
"""Of the Gumbel-sigmoid."""


class Gate(nn.Module):
    """What routers end in: 1 where a logit is above 0, that is where its sigmoid is above 0.5, else 0.

    While it trains, the difference of two Gumbel variables is added to each logit first, and the gradient is that of
    the sigmoid at a temperature of 5 (straight-through).
    """

    noisy = True
    """Whether noise is added while it trains."""

    def gate(self, logits: Tensor) -> Tensor:
        """Logits of any shape -> 0 or 1 for each."""
        if not self.training:
            return (logits > 0).to(logits.dtype)
        if self.noisy:
            one, other = torch.empty_like(logits).exponential_(), torch.empty_like(logits).exponential_()
            logits = logits + other.log() - one.log()
        soft = (logits / TEMPERATURE).sigmoid()
        return (logits > 0).to(logits.dtype) + (soft - soft.detach())


class WidthRouter(Gate):
    """Which heads, or groups of hidden units, run at a timestep; the first always does."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, units - 1)

    def forward(self, e: Tensor) -> Tensor:
        """Timestep embedding (B, D) -> (B, H)."""
        return torch.cat([torch.ones_like(e[:, :1]), self.gate(self.router(e))], dim=1)


class TokenRouter(Gate):
    """Which tokens the MLP runs on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp_head = nn.Sequential(nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, 1)."""
        return self.gate(self.mlp_head(x))


class MaskUnits(nn.Module):
    """Silence units of a layer; a part of its own, so that nobody cuts a layer whose units a router counts."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, H, ...), mask (B, H) -> the same as x."""
        return x * mask.view(*mask.shape, *[1] * (x.ndim - 2))


class RoutedAttention(SelfAttention):
    """Self-attention in which some heads are silent."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.mask_heads = MaskUnits()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, N, D), mask (B, H) of heads -> (B, N, D)."""
        return self.join_heads(self.mask_heads(F.scaled_dot_product_attention(*self.heads_of(x)), mask))

    def whole(self) -> SelfAttention:
        """The same layer with all heads on."""
        width = self.proj.out_features
        with torch.device("meta"):
            layer = SelfAttention(width, self.heads, head_dim=self.head_dim)
        layer.qkv, layer.proj = self.qkv, self.proj
        return layer.train(self.training)


class RoutedMlp(Mlp):
    """An MLP in which some groups of neighbouring hidden units are silent."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.mask_groups = MaskUnits()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, N, D), mask (B, H) of groups -> (B, N, D). GELU(0) is 0, so that a silent unit is a missing one."""
        h = self.fc1(x).unflatten(-1, (mask.shape[1], -1)).transpose(1, 2)  # (B, H, N, 4D/H)
        return self.fc2(self.act(self.mask_groups(h, mask).transpose(1, 2).flatten(2)))

    def whole(self) -> Mlp:
        """The same layer with all groups on."""
        with torch.device("meta"):
            layer = Mlp(self.fc1.in_features, self.fc1.out_features)
        layer.fc1, layer.act, layer.fc2 = self.fc1, self.act, self.fc2
        return layer.train(self.training)


class TokenBlock(dit.Block, SelectingBlock):
    """A DiT block whose MLP runs on some tokens only."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.token_selection = TokenRouter(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)  # each (B, 1, D)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + self.token_selection(x) * (gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m)))

    def token_logits(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N)."""
        return self.token_selection.mlp_head(x)[..., 0]  # type: ignore[no-any-return,operator,index]


class Block(dit.Block):
    """A DiT block with routers of width, which read the timestep alone, and of tokens."""

    attn: RoutedAttention
    mlp: RoutedMlp

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.attn = RoutedAttention(width, heads)
        self.mlp = RoutedMlp(width, int(width * mlp_ratio))
        self.sizes = width, self.mlp.fc1.out_features
        self.attn_rate = WidthRouter(width, heads)
        self.mlp_rate = WidthRouter(width, heads)
        self.token_selection = TokenRouter(width)

    def forward(self, x: Tensor, c: Tensor, e: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, N, D), condition c (B, D), timestep embedding e (B, D) -> (B, N, D)."""
        return self.counted(x, c, e)[0]

    def counted(self, x: Tensor, c: Tensor, e: Tensor, *, complete: bool = False) -> tuple[Tensor, Tensor]:
        """x (B, N, D), c and e (B, D) -> (B, N, D), and each sample's multiply-accumulates (B,) as the paper counts.

        Args:
            x: tokens.
            c: condition.
            e: embedding of the timestep alone.
            complete: let everything run.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)  # each (B, 1, D)
        heads = torch.ones_like(e[:, : self.attn.heads]) if complete else self.attn_rate(e)  # (B, H)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), heads)
        groups = torch.ones_like(heads) if complete else self.mlp_rate(e)  # (B, H)
        tokens = torch.ones_like(x[..., :1]) if complete else self.token_selection(x)  # (B, N, 1)
        mlp = gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m), groups)
        attention_macs, mlp_macs = self.macs(x.shape[1])
        macs = heads.mean(dim=1) * attention_macs + groups.mean(dim=1) * tokens.mean(dim=(1, 2)) * mlp_macs
        return x + tokens * mlp, macs

    def macs(self, tokens: int) -> tuple[int, int]:
        """Multiply-accumulates of attention and MLP on so many tokens with everything on: products alone."""
        width, hidden = self.sizes  # not those of its layers, in whose place others may stand
        return tokens * (4 * width**2 + 2 * tokens * width), tokens * 2 * width * hidden

    def whole(self) -> TokenBlock:
        """The same block without its routers of width."""
        width, hidden = self.attn.proj.out_features, self.mlp.fc1.out_features
        with torch.device("meta"):
            block = TokenBlock(width, self.attn.heads, hidden / width)
        for name, child in self.named_children():
            if not isinstance(child, WidthRouter):
                block.register_module(name, child)
        block.attn, block.mlp = self.attn.whole(), self.mlp.whole()
        return block.train(self.training)


class DyDiT(dit.DiT, RoutedWidth):
    """A DiT whose blocks run in part; it starts as the DiT, with every router saying yes."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        blocks = (Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.initialize()
        for router in self.modules():
            if isinstance(router, WidthRouter):
                nn.init.constant_(router.router.bias, 15)
            elif isinstance(router, TokenRouter):
                nn.init.constant_(router.mlp_head[2].bias, 35)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, S, S), t (B,) in steps, y (B,) class or none -> (B, 2C, S, S), prediction and variance."""
        return self.counted(x, t, y)[0]

    def counted(self, x: Tensor, t: Tensor, y: Tensor, *, complete: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs as of ``forward`` -> its output, and each sample's share of the blocks' multiply-accumulates (B,)."""
        h = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        e = self.t_embedder(t)  # (B, D)
        c = e + self.y_embedder(y)  # (B, D)
        spent, whole = torch.zeros_like(e[:, 0]), 0
        for block in self.blocks:
            h, macs = block.counted(h, c, e, complete=complete)  # type: ignore[operator]
            spent, whole = spent + macs, whole + sum(block.macs(h.shape[1]))  # type: ignore[operator]
        return self.picture(self.final_layer(h, c)), spent / whole

    def width_masks(self, t: Tensor) -> dict[str, Tensor]:
        """Timesteps (T,) -> masks (T, H) of the attention and the MLP of each block."""
        e = self.t_embedder(t)
        masks = {}
        for number, block in enumerate(self.blocks):
            masks[f"blocks.{number}.attn"] = block.attn_rate(e)  # type: ignore[operator]
            masks[f"blocks.{number}.mlp"] = block.mlp_rate(e)  # type: ignore[operator]
        return masks

    def whole_width(self) -> dit.DiT:
        """A DiT with the routers of tokens alone."""
        with torch.device("meta"):
            net = dit.DiT(self.config)
        for name, child in self.named_children():
            net.register_module(name, child)
        net.pos_embed = self.pos_embed
        net.blocks = nn.ModuleList(block.whole() for block in self.blocks)  # type: ignore[operator]
        return net.train(self.training)


def build(config: Config) -> DyDiT:
    """The network with the authors' start."""
    return DyDiT(config)
