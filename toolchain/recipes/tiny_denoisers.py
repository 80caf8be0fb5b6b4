"""Small random networks of diffusers for ``sd3-mmdit-tiny.toml`` and ``ic-lora-tiny.toml``, and an adapter of one."""

from typing import Any

import torch
from torch import Tensor, nn

from enginewright import ModelSpec

RANK = 2
"""Of the adapter."""


def sd3() -> ModelSpec:
    """Stable Diffusion 3's denoiser with three blocks, of which the last gives no text."""
    from diffusers import SD3Transformer2DModel

    module: Any = SD3Transformer2DModel(
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
        module=with_random_weights(module),
        inputs={
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "pooled_projections": torch.randn(2, 10),
            "timestep": torch.tensor([100.0, 700.0]),
        },
        ranges={"timestep": (0, 1000)},
    )


def flux() -> ModelSpec:
    """Flux with two double and two single blocks."""
    from diffusers import FluxTransformer2DModel

    module: Any = FluxTransformer2DModel(
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
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    rows = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
    return ModelSpec(
        module=with_random_weights(module),
        inputs=inputs,
        dynamic={name: {0: ("batch", 1, 8)} for name in rows},
        ranges={"timestep": (0, 1), "img_ids": (0, 4), "guidance": (1, 6)},
    )


def with_random_weights(module: nn.Module) -> nn.Module:
    """The network with every weight moved: norms whose weights are all one would hide faults."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def adapter() -> dict[str, Tensor]:
    """What ``ic-lora-tiny.safetensors`` holds: for each linear layer of Flux's blocks two random factors."""
    torch.manual_seed(0)
    tensors = {}
    for path, layer in flux().module.named_modules():
        if "transformer_blocks." in path and isinstance(layer, nn.Linear):
            tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(RANK, layer.in_features) / 8
            tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(layer.out_features, RANK) / 8
    return tensors
