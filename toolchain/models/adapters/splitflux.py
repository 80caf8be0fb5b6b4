"""SplitFlux: low-rank adapters on Flux's single blocks that hold an image's content apart from its style.

Source: Yang et al. 2025, arXiv:2511.15258 (CVPR 2026): early single blocks carry content, later ones style. At the
boundary between them the rank is halved and the product doubled (rank-constrained adaptation). In the content blocks a
branch of high rank and one of low rank are mixed for each token, by how far its norm stands out (visual gate).

Not checked against the authors' code, which could not be read (yangyt46/SplitFlux): written from notes on the paper
and figure 2 of the authors' page. Inference: that the adapters sit on queries, keys and values alone, from the two
published counts, 43.65 M and 44.83 M, which then come out exactly. The base is diffusers' ``FluxTransformer2DModel``.

Where the gate comes from is our choice: a block's own normalised input, which queries, keys and values read. Layer norm
has made its tokens equally long, so their norms differ only as the modulation stretches them. Without modulation
nothing stands out, and the gate would amplify rounding.

Shapes: B batch, T text tokens, I image tokens, N = T + I tokens of a single block, text first, D width, r rank.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.errors import require
from enginewright.ground.signature import InputSpec
from enginewright.models.blocks.low_rank import LowRank, Product, products, with_added
from enginewright.passes.traits import AdaptedLayer
from enginewright.sources.contract import Published
from enginewright.sources.denoisers import FlatFlux, flux_inputs

Part = Literal["content", "style"]
TARGETS = ("to_q", "to_k", "to_v")
LOSS_WEIGHT = 0.1
"""What ``complementary_loss``, summed over the gated layers, is multiplied by beside the denoising loss."""
EPSILON = 1e-6
"""Keeps the gate finite where all image tokens are equally long; not given in the paper."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A Flux, and which of its single blocks carry what.

    Args:
        double: blocks with streams of their own for text and image; they have no adapters.
        single: blocks over text and image in one row.
        heads: attention heads, ``head_dim`` wide each.
        head_dim: width of a head.
        axes: features of a head that turn with each of the three position ids.
        channels: width of an image token.
        text_width: width of a text token.
        pooled_width: width of the pooled text.
        side: the image has side * side tokens.
        text: text tokens; every single block's first ones.
        content: indices of single blocks with a gated adapter.
        boundary: indices of single blocks with the content's adapter of reduced rank.
        style: indices of single blocks with the style's adapter.
        rank: of the style's adapters, and of both branches of a gated one together.
        residual_rank: of the low-rank branch of a gated adapter.
        alpha: divides the rank of the boundary's adapters, and multiplies their product.
    """

    double: int
    single: int
    heads: int
    head_dim: int
    axes: tuple[int, int, int]
    channels: int
    text_width: int
    pooled_width: int
    side: int
    text: int
    content: range
    boundary: range
    style: range
    rank: int
    residual_rank: int
    alpha: int = 2


PUBLISHED = {
    "dev": Config(
        double=19,
        single=38,
        heads=24,
        head_dim=128,
        axes=(16, 56, 56),
        channels=64,
        text_width=4096,
        pooled_width=768,
        side=64,  # 1024 x 1024 pixels; not given in the paper
        text=512,
        content=range(10),
        boundary=range(10, 12),
        style=range(12, 38),
        rank=64,
        residual_rank=16,
    )
}
SHIPPED: dict[str, Config] = {}
TINY = Config(
    double=1,
    single=4,
    heads=4,
    head_dim=8,
    axes=(2, 2, 4),
    channels=4,
    text_width=12,
    pooled_width=10,
    side=4,
    text=6,
    content=range(2),
    boundary=range(2, 3),
    style=range(3, 4),
    rank=4,
    residual_rank=1,
)
OUTPUTS = ("velocity",)
FIGURES = {"dev": (Published(figure="adapter_parameter_count", value="43.65 M", source="arXiv:2511.15258"),)}


class GatedLowRank(nn.Module, AdaptedLayer):
    """A linear layer and two products mixed by a gate for each token: W x + g B_cnt A_cnt x + (1 - g) B_res A_res x."""

    part: Part = "content"
    branches: ClassVar[tuple[str, ...]] = ("content", "residual")
    mixed_by: ClassVar[str] = "a gate mixes its two branches anew for each token"

    def __init__(self, linear: nn.Linear, rank: int, residual_rank: int, *, text: int) -> None:
        super().__init__()
        self.base = linear
        self.content = Product(linear, rank)
        self.residual = Product(linear, residual_rank)
        self.text = text

    def gate(self, x: Tensor) -> Tensor:
        """X (B, N, D) -> g (B, N, 1): sigmoid of an image token's norm, standardised over the image; 1 for text.

        Text at 1 and the standard deviation over I - 1 are our choices; neither is given in the paper.
        """
        norm = torch.linalg.vector_norm(x[:, self.text :].float(), dim=-1, keepdim=True)  # (B, I, 1)
        deviation = norm.std(dim=1, keepdim=True, correction=1)  # (B, 1, 1)
        g = ((norm - norm.mean(dim=1, keepdim=True)) / (deviation + EPSILON)).sigmoid()
        return F.pad(g, (0, 0, self.text, 0), value=1.0).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, N, D_in) -> (B, N, D_out)."""
        g = self.gate(x)
        return self.base(x) + self.content(x, g) + self.residual(x, 1 - g)

    def branch(self, name: str) -> Product:
        """One of the two branches: where every gate is 1 the content's is left, where it is 0 the residual's."""
        return self.content if name == "content" else self.residual

    def merged(self, branch: str = "content") -> nn.Linear:
        """The linear layer of one branch alone, as if every gate were at its end."""
        return with_added(self.base, self.branch(branch).matrix())

    def held_at(self, branch: str) -> LowRank:
        """The same, unmerged."""
        return LowRank(self.base, self.branch(branch), part=self.part).train(self.training)


def attach(flux: nn.Module, config: Config) -> nn.Module:
    """Put the adapters beside queries, keys and values of a Flux's single blocks, in place; they add nothing yet."""
    blocks: Any = flux.single_transformer_blocks
    for name in TARGETS:
        for i in config.content:
            rank, low = config.rank - config.residual_rank, config.residual_rank
            setattr(blocks[i].attn, name, GatedLowRank(getattr(blocks[i].attn, name), rank, low, text=config.text))
        for i in config.boundary:
            linear, alpha = getattr(blocks[i].attn, name), config.alpha
            product = Product(linear, config.rank // alpha)
            setattr(blocks[i].attn, name, LowRank(linear, product, alpha, part="content"))
        for i in config.style:
            linear = getattr(blocks[i].attn, name)
            setattr(blocks[i].attn, name, LowRank(linear, Product(linear, config.rank), part="style"))
    return flux


def complementary_loss(content: Product, residual: Product) -> Tensor:
    """How much two products of one layer share: ||A C'||^2 + ||B' D||^2 + sum |B A o D C| -> one number.

    Content is B A, residual is D C. That the last term is a sum, not a mean, is our reading.
    """
    inputs = content.down.weight @ residual.down.weight.T  # (r, r_res)
    outputs = content.up.weight.T @ residual.up.weight  # (r, r_res)
    both = (content.up.weight @ content.down.weight) * (residual.up.weight @ residual.down.weight)  # (D_out, D_in)
    return inputs.square().sum() + outputs.square().sum() + both.abs().sum()


def flux_config(config: Config) -> dict[str, Any]:
    """The sizes of the base as diffusers names them."""
    return {
        "in_channels": config.channels,
        "num_layers": config.double,
        "num_single_layers": config.single,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "axes_dims_rope": config.axes,
        "guidance_embeds": True,
    }


def adapter_tensors(model: nn.Module, parts: Collection[Part], branch: str = "content") -> dict[str, Tensor]:
    """The adapters of a model as a file of peft's keys holds them, each with its alpha.

    Args:
        model: a Flux with adapters, or any module around one.
        parts: whose adapters.
        branch: of a gated adapter, which such a file cannot mix.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LowRank | GatedLowRank) and layer.part in parts:
            product = layer.product if isinstance(layer, LowRank) else layer.branch(branch)
            alpha = layer.alpha if isinstance(layer, LowRank) else 1.0
            name = path.removeprefix("inner.")
            tensors[f"{name}.lora_A.weight"] = product.down.weight.detach()
            tensors[f"{name}.lora_B.weight"] = product.up.weight.detach()
            tensors[f"{name}.alpha"] = torch.tensor(product.down.out_features * alpha)  # readers divide it by the rank
    return tensors


class SplitFlux(FlatFlux):
    """Flux at one size of text and picture: the tables of its rotary positions are constants, and no input."""

    ids: Tensor

    def __init__(self, inner: Any, config: Config) -> None:
        rotary = inner.pos_embed  # diffusers' own, in float64; rounded once
        super().__init__(inner)
        ids = position_ids(config)
        inner.pos_embed = Tables(*rotary(ids))
        self.text = config.text
        self.register_buffer("ids", ids, persistent=False)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        """(B, I, C), (B, T, text width), (B, pooled width), (B,), (B,) -> (B, I, C)."""
        return super().forward(
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            img_ids=self.ids[self.text :],
            txt_ids=self.ids[: self.text],
            guidance=guidance,
        )


class Tables(nn.Module):
    """Answers with the same cosine and sine (N, head_dim), whatever the ids."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, cosine: Tensor, sine: Tensor) -> None:
        super().__init__()
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (N, 3) -> (N, head_dim) twice."""
        del ids
        return self.cosine, self.sine


def position_ids(config: Config) -> Tensor:
    """(N, 3): zeros for text; 0, row and column for image tokens, as diffusers' pipeline hands them over."""
    cell = torch.arange(config.side**2)
    image = torch.stack([torch.zeros_like(cell), cell // config.side, cell % config.side], dim=1)
    return torch.cat([image.new_zeros(config.text, 3), image]).float()


def build(config: Config) -> SplitFlux:
    """A Flux with adapters whose products are a fifth or so of a fresh layer's output."""
    flux = require("diffusers", extra="diffusers").FluxTransformer2DModel(**flux_config(config))
    model = SplitFlux(attach(flux, config), config)
    for product in products(model):
        nn.init.normal_(product.up.weight, std=0.2 * product.up.in_features**-0.5)
    return model


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """As any Flux is called, at one size of image and text: noisy tokens, text, timestep, guidance; no positions."""
    specs = flux_inputs(flux_config(config), image=config.side**2, text=config.text, side=config.side)
    return tuple(spec for spec in specs if spec.role != "positions")
