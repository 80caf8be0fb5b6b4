"""DiT: a diffusion transformer conditioned through adaptive layer norms that start at zero.

Source: Peebles and Xie 2022, arXiv:2212.09748, section 3 and figure 3. Parameter names follow the authors' release,
so that their checkpoints load. ``digits`` is ours: a small size trained on 4,000 MNIST images (see
``toolchain/training/dit_digits.py``); it works on pixels, not latents.

Shapes: B batch, C channels, S image side, P patch, N = (S/P)^2 tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.models.blocks.embedders import LabelEmbedder, TimestepEmbedder
from enginewright.models.blocks.transformer import Mlp, SelfAttention
from enginewright.passes.traits import ModulatedBlock, PatchNetwork
from enginewright.sources.contract import Published
from enginewright.validation.contract import SamplingTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of DiT. ``side`` is the side of the input in latent (or pixel) cells."""

    depth: int
    width: int
    heads: int
    patch: int = 2
    side: int = 32
    channels: int = 4
    classes: int = 1000
    mlp_ratio: float = 4.0


PUBLISHED = {
    "S/2": Config(depth=12, width=384, heads=6),
    "B/2": Config(depth=12, width=768, heads=12),
    "L/2": Config(depth=24, width=1024, heads=16),
    "XL/2": Config(depth=28, width=1152, heads=16),
}
SHIPPED = {"digits": Config(depth=4, width=192, heads=6, patch=4, side=28, channels=1, classes=10)}
TINY = Config(depth=2, width=32, heads=4, side=8, classes=4)
OUTPUTS = ("prediction_and_variance",)
FIGURES = {
    size: (
        Published(figure="parameter_count", value=count, source="arXiv:2212.09748, table 1"),
        Published(figure="macs", value=macs, source="arXiv:2212.09748, table 4; its Gflops are multiply-accumulates"),
    )
    for size, count, macs in (
        ("S/2", "33 M", "6.06 G"),
        ("B/2", "130 M", "23.01 G"),
        ("L/2", "458 M", "80.71 G"),
        ("XL/2", "675 M", "118.64 G"),
    )
}


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to a token."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, S, S) -> (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """X (B, N, D), shift and scale (B, 1, D) -> (B, N, D)."""
    return x * (1 + scale) + shift


class Block(nn.Module, ModulatedBlock):
    """Attention and MLP, each with shift, scale and gate from the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """X (B, N, D), c (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)  # each (B, 1, D)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """C (B, D) -> shift, scale and gate of each half, (B, 1, D)."""
        return self.adaLN_modulation(c)[:, None].chunk(6, dim=2)


class FinalLayer(nn.Module):
    """The last modulated norm, and a projection to patches of prediction and variance."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """X (B, N, D), c (B, D) -> (B, N, P*P*2C)."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)  # each (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def position_table(width: int, side: int) -> Tensor:
    """Sines and cosines of column and row -> (1, side*side, width); the first half codes the column."""
    rate = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate  # (side, width/4)
    code = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (side, width/2)
    column = code[None].expand(side, side, -1)
    row = code[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, width)


class DiT(nn.Module, PatchNetwork):
    """Predict noise (``digits``: velocity) and the next step's variance from an image, its timestep and class."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        tokens = (config.side // config.patch) ** 2
        self.x_embedder = PatchEmbed(config.channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.classes, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch, 2 * config.channels)
        self.initialize()

    def initialize(self) -> None:
        """The authors' start: Xavier linears, small embeddings, and every gate and the output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.width, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for part in (*self.blocks, self.final_layer):
            for zero in part.adaLN_modulation[1].parameters():  # type: ignore[index,union-attr]
                nn.init.zeros_(zero)  # type: ignore[arg-type]
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        with torch.no_grad():
            self.pos_embed.copy_(position_table(self.config.width, self.config.side // self.config.patch))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, S, S), t (B,) in steps, y (B,) class or none -> (B, 2C, S, S), prediction and variance."""
        h = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            h = block(h, c)
        return self.picture(self.final_layer(h, c))

    def picture(self, h: Tensor) -> Tensor:
        """Patches (B, N, P*P*2C), row by row -> (B, 2C, S, S)."""
        batch, patch = h.shape[0], self.config.patch
        side = self.config.side // patch
        h = h.view(batch, side, side, patch, patch, -1)  # (B, S/P, S/P, P, P, 2C)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side * patch, side * patch)


def build(config: Config) -> DiT:
    """The network with the authors' start."""
    return DiT(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Noisy image or latent, timestep, class."""
    batch = Dim(name="batch", low=1, typical=2, high=64)
    return (
        InputSpec(name="x", role="sample", shape=(batch, config.channels, config.side, config.side)),
        InputSpec(name="t", role="timestep", shape=(batch,), low=0, high=999),
        InputSpec(name="y", role="condition", shape=(batch,), dtype="int64", low=0, high=config.classes + 1),
    )


def task(size: str, config: Config) -> SamplingTask | None:
    """Draw digits and have them judged; other sizes have no judge."""
    if size != "digits":
        return None
    from enginewright.models.blocks.digits import digits_task

    return digits_task(none=config.classes)


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]] | None:
    """Inputs met on real sampling runs, where the network is trained."""
    if size != "digits":
        return None
    from enginewright.models.blocks.digits import met_on_runs

    return lambda count, seed: met_on_runs(module, none=config.classes, count=count, seed=seed)
