"""Small networks of diffusers with random weights, for recipes that need a Flux or a U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from enginewright import ModelSpec

ROWS, SIDE, TEXT = 6, 4, 5
"""Of an example call; sides of the image in tokens; tokens of text."""


class FluxOfOneSize(nn.Module):
    """A Flux whose positions are those of one picture: constants, so that no table is computed in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        places = torch.arange(SIDE * SIDE)
        ids = torch.stack([torch.zeros(SIDE * SIDE), places // SIDE, places % SIDE], dim=1)
        self.register_buffer("img_ids", ids)
        self.register_buffer("txt_ids", torch.zeros(TEXT, 3))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        """(B, T, C), (B, N, D), (B, P), (B,), (B,) -> (B, T, C)."""
        found: tuple[Tensor, ...] = self.inner(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            guidance=guidance,
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            return_dict=False,
        )
        return found[0]


def shaken(network: Any) -> nn.Module:
    """Every weight random: a gate that is shut would hide what stands before it."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made: nn.Module = network.eval()
    return made


def flux() -> ModelSpec:
    """Two double blocks and two single ones, on 16 tokens of image and 5 of text."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    inner = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(ROWS, SIDE * SIDE, 4),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, 12),
        "pooled_projections": torch.randn(ROWS, 10),
        "timestep": torch.full((ROWS,), 0.7),
        "guidance": torch.full((ROWS,), 3.5),
    }
    return ModelSpec(
        module=FluxOfOneSize(shaken(inner)), inputs=inputs, ranges={"timestep": (0, 1), "guidance": (1, 5)}
    )


class UNetAlone(nn.Module):
    """A U-Net that gives a tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """(B, C, h, w), (B,), (B, N, D) -> (B, C, h, w)."""
        found: tuple[Tensor, ...] = self.inner(
            sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False
        )
        return found[0]


def unet() -> ModelSpec:
    """Two levels, of which the larger attends to 8 x 8 tokens of its own and to 5 of text."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    inner = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    inputs = {
        "sample": torch.randn(ROWS, 4, 8, 8),
        "timestep": torch.full((ROWS,), 500.0),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, 12),
    }
    return ModelSpec(module=UNetAlone(shaken(inner)), inputs=inputs, ranges={"timestep": (0, 999)})
