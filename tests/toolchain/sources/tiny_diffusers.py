"""Small random networks of diffusers, one of each family, with every part that the real ones have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def pixart(**settings: Any) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
            "use_additional_conditions": False,
            **settings,
        }
    )


def pixart_conditioned() -> nn.Module:
    return pixart(
        use_additional_conditions=True,
        interpolation_scale=2,
        out_channels=4,
        num_attention_heads=3,
        cross_attention_dim=24,
    )


def unet(**settings: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **settings,
        }
    )


def unet_xl() -> nn.Module:
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
        use_linear_projection=True,
        time_cond_proj_dim=6,
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def cogvideox(**settings: Any) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 6,
            "sample_frames": 9,
            "max_text_seq_length": 5,
            **settings,
        }
    )


def cogvideox_rotary() -> nn.Module:
    return cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, ofs_embed_dim=8, patch_bias=False)


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def clip_autoencoder() -> nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=16,
        sample_width=24,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dit": dit,
    "pixart": pixart,
    "pixart_conditioned": pixart_conditioned,
    "unet": unet,
    "unet_xl": unet_xl,
    "sd3": sd3,
    "flux": flux,
    "cogvideox": cogvideox,
    "cogvideox_rotary": cogvideox_rotary,
}


def shaken(network: nn.Module) -> nn.Module:
    """Every weight random and none zero: a gate that is shut, or a norm that does nothing, would hide faults."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def text_encoders() -> dict[str, nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=8,
        bos_token_id=98,
        eos_token_id=99,
    )
    t5 = T5Config(
        vocab_size=100, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {
        "text_encoder": shaken(CLIPTextModel(clip)),
        "text_encoder_2": shaken(CLIPTextModelWithProjection(clip)),
        "text_encoder_3": shaken(T5EncoderModel(t5)),
    }


def stable_diffusion(folder: Path) -> None:
    """Write a whole pipeline with a text encoder and a tokenizer that knows single characters."""
    import diffusers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    signs = sorted(ByteLevel.alphabet())
    words = [*signs, *(f"{sign}</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "words" / "vocab.json"), str(folder / "words" / "merges.txt"))
    tokenizer.model_max_length = 16
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    diffusers.StableDiffusionPipeline(
        vae=shaken(autoencoder()),
        unet=shaken(unet(cross_attention_dim=12)),
        text_encoder=shaken(CLIPTextModel(text)),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
