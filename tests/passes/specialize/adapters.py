"""Adapter files of each form, and small networks of diffusers that they are for."""

import torch
from safetensors.torch import save_file

from enginewright.passes.contract import Context

PATHS = ("blocks.0.attn.qkv", "blocks.1.mlp.fc1", "x_embedder.proj")


def factors(model, paths=PATHS, rank=3):
    """Random A and B for each layer."""
    found = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        rest = [1] * (weight.ndim - 2)
        found[path] = torch.randn(rank, *weight.shape[1:]) / 4, torch.randn(weight.shape[0], rank, *rest) / 4
    return found


FORMS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft_default": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "down_up": ("{}.lora_down.weight", "{}.lora_up.weight"),
}


def written(folder, pairs, form="peft", more=None, name="lora.safetensors"):
    """Write a file; a context in whose folder it lies."""
    down, up = FORMS[form]
    tensors = {down.format(path): pair[0] for path, pair in pairs.items()}
    tensors |= {up.format(path): pair[1] for path, pair in pairs.items()}
    save_file({**tensors, **(more or {})}, folder / name)
    return Context(folder=folder)


def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    more = {"joint_attention_dim": 16, "pooled_projection_dim": 16, "in_channels": 4, "axes_dims_rope": (4, 2, 2)}
    return FluxTransformer2DModel(**sizes, **more).eval()


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=2,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
