"""LI-DiT: a diffusion transformer that reads what two language models say of a caption, made fit for it by refiners.

Source: Ma et al. 2024, arXiv:2406.11831, sections 3 and 4 and its appendix's table of sizes. The authors published no
code, so nothing is checked beside it. Inference, from the published sizes "1B" and "10B": attention to the picture and
to the text and an MLP of ratio 4, 16 D^2 for each block, and nine vectors of modulation of its own, 9 D^2.

Two networks run in turn. The refiner depends on the timestep, so that it runs in every step; the language models do
not: give their hidden states after the third block from the end, for which ``cut_after`` leaves out all later ones.

Shapes: B batch, S tokens of a prompt (a fixed instruction of I tokens, then the caption, then padding), L width of the
language models, N text tokens (both captions in a row), C channels of the latent, Y x X its cells, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.program import Network, in_turn
from enginewright.ground.signature import Dim, InputSpec
from enginewright.models.blocks.embedders import TimestepEmbedder
from enginewright.models.blocks.llama import RMSNorm
from enginewright.models.blocks.transformer import Mlp, SelfAttention
from enginewright.models.diffusion.dit import FinalLayer, modulate
from enginewright.passes.networks import Networks
from enginewright.passes.traits import FusedAttention, StreamBlock


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of LI-DiT.

    Args:
        depth: blocks of the denoiser.
        width: of the denoiser.
        heads: attention heads of the denoiser.
        side: the usual side of the latent; the network takes others.
        channels: of the latent.
        patch: side of a patch of the latent.
        mlp_ratio: hidden width of every MLP, in widths of what it reads.
        text_width: of the language models, and of the refiner.
        text_heads: attention heads of the refiner.
        tokens: of each language model's prompt, instruction and padding with it: one entry or two.
        instruction: how many of them, from the first, are the instruction; it is cut off after the refiner.
        refiner_depth: blocks of each language model's token refiner.
    """

    depth: int
    width: int
    heads: int
    side: int = 32
    channels: int = 16
    patch: int = 2
    mlp_ratio: int = 4  # not given in the paper
    text_width: int = 4096
    text_heads: int = 32  # not given in the paper
    tokens: tuple[int, ...] = (333, 333)  # not given in the paper
    instruction: tuple[int, ...] = (77, 77)  # not given in the paper
    refiner_depth: int = 2


PUBLISHED = {
    "1B": Config(depth=28, width=1152, heads=16),
    "10B": Config(depth=48, width=2816, heads=44, side=128),
}
SHIPPED: dict[str, Config] = {}
TINY = Config(
    depth=2,
    width=32,
    heads=4,
    side=8,
    channels=4,
    text_width=24,
    text_heads=3,
    tokens=(9, 7),
    instruction=(3, 2),
)
OUTPUTS = ("noise",)
BATCH = Dim(name="batch", low=1, typical=2, high=16)


def mean_of(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens x (B, S, L) that a mask (B, S) of ones and zeros keeps -> (B, L)."""
    kept = mask.float()[:, :, None]
    return ((x.float() * kept).sum(1) / kept.sum(1)).to(x.dtype)


class CrossAttention(nn.Module):
    """Let tokens read those of a source, where a mask lets them."""

    def __init__(self, width: int, heads: int, *, is_normed: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.q_norm = RMSNorm(self.head_dim) if is_normed else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if is_normed else nn.Identity()

    def forward(self, x: Tensor, source: Tensor, seen: Tensor) -> Tensor:
        """x (B, N, D), source (B, N', D), seen (B, 1, 1, N') -> (B, N, D)."""
        q = self.q(x).unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)  # (B, H, N, D/H)
        kv = self.kv(source).unflatten(2, (2, self.heads, self.head_dim))  # (B, N', 2, H, D/H)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N', D/H)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=seen)
        return self.proj(y.transpose(1, 2).flatten(2))


class TokenRefiner(nn.Module, StreamBlock):
    """Attention to all tokens, later ones too, and an MLP; gates from the condition start at zero."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)  # their kind is not given in the paper
        self.attn = SelfAttention(width, heads)
        self.mlp = Mlp(width, mlp_ratio * width)
        self.gates = nn.Linear(width, 2 * width)
        start_at_zero(self.gates)

    def forward(self, x: Tensor, c: Tensor, seen: Tensor) -> Tensor:
        """x (B, S, L), c (B, L), seen (B, 1, 1, S) -> (B, S, L)."""
        gate_a, gate_m = self.gates(c)[:, None].chunk(2, dim=2)  # each (B, 1, L)
        x = x + gate_a * self.attn(self.norm1(x), seen)
        return x + gate_m * self.mlp(self.norm2(x))


class Collaboration(nn.Module):
    """Let the tokens of one language model read those of the other, then an MLP, both modulated by the condition.

    Without another language model the MLP alone remains.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int, *, is_alone: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm_other = nn.LayerNorm(width)  # not given in the paper
        self.cross = None if is_alone else CrossAttention(width, heads, is_normed=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, mlp_ratio * width)
        self.modulation = nn.Linear(width, (3 if is_alone else 6) * width)
        start_at_zero(self.modulation)

    def forward(self, x: Tensor, c: Tensor, other: Tensor | None, seen: Tensor | None) -> Tensor:
        """x (B, S, L), c (B, L), other (B, S', L) and seen (B, 1, 1, S') where there is another -> (B, S, L)."""
        *attention, shift, scale, gate = self.modulation(c)[:, None].split(x.shape[2], dim=2)  # each (B, 1, L)
        if self.cross is not None:
            shift_a, scale_a, gate_a = attention
            x = x + gate_a * self.cross(modulate(self.norm1(x), shift_a, scale_a), self.norm_other(other), seen)
        return x + gate * self.mlp(modulate(self.norm2(x), shift, scale))


class Refiner(nn.Module):
    """Make one row of text tokens of what causal language models say of a caption."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, heads, ratio = config.text_width, config.text_heads, config.mlp_ratio
        self.instruction = config.instruction
        models = range(len(config.tokens))
        self.t_embedder = TimestepEmbedder(width)
        self.token_refiners = nn.ModuleList(
            nn.ModuleList(TokenRefiner(width, heads, ratio) for _ in range(config.refiner_depth)) for _ in models
        )
        self.collaborations = nn.ModuleList(
            Collaboration(width, heads, ratio, is_alone=len(models) == 1) for _ in models
        )
        self.project = nn.Linear(width, config.width)  # where the width changes is not given in the paper

    def forward(
        self,
        t: Tensor,
        hidden_1: Tensor,
        mask_1: Tensor,
        hidden_2: Tensor | None = None,
        mask_2: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine the tokens of each language model alone, then each by the other's, and cut the instruction off.

        Args:
            t: (B,) in steps.
            hidden_1: (B, S, L) of the first language model.
            mask_1: (B, S) 1 for tokens, 0 for padding.
            hidden_2: (B, S', L) of the second, where there are two.
            mask_2: (B, S') of the second.

        Returns:
            Text tokens (B, N, D), their mask (B, N), and the mean features of all language models in a row.
        """
        hidden = [hidden_1] if hidden_2 is None else [hidden_1, hidden_2]
        masks = [mask_1] if mask_2 is None else [mask_1, mask_2]
        pooled = [mean_of(h, mask) for h, mask in zip(hidden, masks, strict=True)]  # each (B, L)
        time = self.t_embedder(t)  # (B, L)
        conditions = [each + time for each in pooled]
        seen = [mask[:, None, None] > 0.5 for mask in masks]
        alone = []
        for x, c, own, blocks in zip(hidden, conditions, seen, self.token_refiners, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, c, own)
            alone.append(x)
        others = [(None, None)] if len(alone) == 1 else zip(alone[::-1], seen[::-1], strict=True)
        refined = [
            block(x, c, *other)
            for block, x, c, other in zip(self.collaborations, alone, conditions, others, strict=True)
        ]
        text = [x[:, cut:] for x, cut in zip(refined, self.instruction, strict=True)]
        kept = [mask[:, cut:] for mask, cut in zip(masks, self.instruction, strict=True)]
        return self.project(torch.cat(text, dim=1)), torch.cat(kept, dim=1), torch.cat(pooled, dim=1)


class NormedSelfAttention(nn.Module, FusedAttention):
    """Multi-head self-attention whose queries and keys have unit root mean square in each head, times a weight."""

    kept_whole = ("q_norm", "k_norm")

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        q, k, v = self.heads_of(x)  # each (B, H, N, D/H)
        return self.join_heads(F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v))


class Block(nn.Module, StreamBlock):
    """Attention to the picture, attention to the text and an MLP, each with shift, scale and gate of its own."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = NormedSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.cross = CrossAttention(width, heads, is_normed=True)
        self.norm3 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, mlp_ratio * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 9 * width))
        start_at_zero(self.adaLN_modulation[1])

    def forward(self, x: Tensor, c: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        """x (B, N, D), c (B, D), text (B, N', D), seen (B, 1, 1, N') -> (B, N, D)."""
        condition = self.adaLN_modulation(c)[:, None].chunk(9, dim=2)  # each (B, 1, D)
        shift_a, scale_a, gate_a, shift_c, scale_c, gate_c, shift_m, scale_m, gate_m = condition
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        x = x + gate_c * self.cross(modulate(self.norm2(x), shift_c, scale_c), text, seen)
        return x + gate_m * self.mlp(modulate(self.norm3(x), shift_m, scale_m))


class ConvPositions(nn.Module):
    """A residual of two convolutions: their zero padding tells a cell where it lies, in maps of any size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)  # what is in the block is not given in the paper
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, Y, X) -> (B, D, Y, X)."""
        return x + self.conv2(F.silu(self.conv1(x)))


class DiT(nn.Module):
    """Predict the noise in a latent from its timestep, text tokens and the mean features of the language models."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.patch = config.patch
        self.x_embedder = nn.Conv2d(config.channels, width, config.patch, config.patch)
        self.positions = ConvPositions(width)
        self.t_embedder = TimestepEmbedder(width)
        self.pooled_embedder = nn.Sequential(
            nn.Linear(len(config.tokens) * config.text_width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch, config.channels)
        for part in (self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            start_at_zero(part)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, pooled: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: (B, C, Y, X).
            t: (B,) in steps.
            text: (B, N, D).
            text_mask: (B, N) 1 for tokens, 0 for padding; every caption has a token.
            pooled: mean features of all language models in a row.

        Returns:
            Noise (B, C, Y, X).
        """
        h = self.positions(self.x_embedder(x))  # (B, D, Y/P, X/P)
        rows, columns = h.shape[2:]
        c = self.t_embedder(t) + self.pooled_embedder(pooled)  # (B, D)
        h, seen = h.flatten(2).transpose(1, 2), text_mask[:, None, None] > 0.5  # (B, Y/P * X/P, D)
        for block in self.blocks:
            h = block(h, c, text, seen)
        h = self.final_layer(h, c).unflatten(1, (rows, columns)).unflatten(3, (self.patch, self.patch, -1))
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, Y/P, P, X/P, P) -> (B, C, Y, X)


def start_at_zero(layer: nn.Module) -> None:
    """Set a linear layer to zero."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)


def text_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Hidden states of each language model, and which of its tokens are no padding."""
    return tuple(
        spec
        for number, tokens in enumerate(config.tokens, start=1)
        for spec in (
            InputSpec(name=f"hidden_{number}", role="condition", shape=(BATCH, tokens, config.text_width)),
            InputSpec(name=f"mask_{number}", role="mask", shape=(BATCH, tokens), default=1),
        )
    )


def build(config: Config) -> Networks:
    """The refiner, then the denoiser, both with gates of zero, so that a new network gives zeros."""
    assert len(config.tokens) == len(config.instruction) in (1, 2), "one language model or two"
    text = sum(config.tokens) - sum(config.instruction)
    inner = [
        InputSpec(name="text", role="condition", shape=(BATCH, text, config.width)),
        InputSpec(name="text_mask", role="mask", shape=(BATCH, text), default=1),
        InputSpec(name="pooled", role="condition", shape=(BATCH, len(config.tokens) * config.text_width)),
    ]
    names = tuple(spec.name for spec in inner)
    ways = {
        "refiner": Network(takes=("t", *(spec.name for spec in text_inputs(config))), outputs=names),
        "dit": Network(takes=("x", "t", *names)),
    }
    return Networks({"refiner": Refiner(config), "dit": DiT(config)}, in_turn(ways, inner))


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Noisy latent, timestep, and hidden states and mask of each language model."""
    height, width = (
        Dim(name=name, low=4 * config.patch, typical=config.side, high=2 * config.side, multiple_of=config.patch)
        for name in ("height", "width")
    )
    return (
        InputSpec(name="x", role="sample", shape=(BATCH, config.channels, height, width)),
        InputSpec(name="t", role="timestep", shape=(BATCH,), low=0, high=999),
        *text_inputs(config),
    )
