"""Small networks of diffusers with random weights, for recipes that need a Flux, an SD3 or a U-Net; and an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from enginewright import ModelSpec

ROWS, SIDE, TEXT = 6, 4, 5
"""Of an example call; sides of the image in tokens; tokens of text."""

RANK = 2
"""Of the adapter."""


def positions() -> tuple[Tensor, Tensor]:
    """Where Flux's tokens of image (T, 3) and of text (N, 3) stand."""
    places = torch.arange(SIDE * SIDE)
    return torch.stack([torch.zeros(SIDE * SIDE), places // SIDE, places % SIDE], dim=1), torch.zeros(TEXT, 3)


class FluxOfOneSize(nn.Module):
    """A Flux whose positions are those of one picture: constants, so that no table is computed in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        image, text = positions()
        self.register_buffer("img_ids", image)
        self.register_buffer("txt_ids", text)

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


def flux_network() -> nn.Module:
    """Two double blocks and two single ones."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return shaken(
        FluxTransformer2DModel(
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
    )


def flux_call() -> dict[str, Tensor]:
    """A call of it, on 16 tokens of image and 5 of text, without their positions."""
    return {
        "hidden_states": torch.randn(ROWS, SIDE * SIDE, 4),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, 12),
        "pooled_projections": torch.randn(ROWS, 10),
        "timestep": torch.full((ROWS,), 0.7),
        "guidance": torch.full((ROWS,), 3.5),
    }


def flux() -> ModelSpec:
    """A Flux for pictures of one size."""
    module = FluxOfOneSize(flux_network())
    return ModelSpec(module=module, inputs=flux_call(), ranges={"timestep": (0, 1), "guidance": (1, 5)})


def flux_of_any_size() -> ModelSpec:
    """The same Flux as diffusers has it, the positions of tokens among its inputs."""
    module, call = flux_network(), flux_call()
    image, text = positions()
    return ModelSpec(
        module=module,
        inputs={**call, "img_ids": image, "txt_ids": text},
        dynamic={name: {0: ("batch", 1, 8)} for name in call},
        ranges={"timestep": (0, 1), "img_ids": (0, SIDE), "guidance": (1, 6)},
    )


def adapter() -> dict[str, Tensor]:
    """What ``ic-lora-tiny.safetensors`` holds: for each linear layer of Flux's blocks two random factors."""
    network = flux_network()
    torch.manual_seed(1)
    tensors = {}
    for path, layer in network.named_modules():
        if "transformer_blocks." in path and isinstance(layer, nn.Linear):
            tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(RANK, layer.in_features) / 8
            tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(layer.out_features, RANK) / 8
    return tensors


def sd3() -> ModelSpec:
    """Stable Diffusion 3's denoiser with three blocks, of which the last gives no text."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    module = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return ModelSpec(
        module=shaken(module),
        inputs={
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, TEXT, 12),
            "pooled_projections": torch.randn(2, 10),
            "timestep": torch.tensor([100.0, 700.0]),
        },
        ranges={"timestep": (0, 1000)},
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
