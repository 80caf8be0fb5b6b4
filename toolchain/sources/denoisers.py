"""The denoising networks of diffusers: what each takes, worked out from its configuration.

Timesteps are float32 everywhere: some schedulers give fractions. Shapes: B batch, C channels, h x w latent size,
F latent frames, N text tokens, T image tokens, D text width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim, InputSpec
from enginewright.sources.flat import BATCH, Config, Family, Flat, side, sides

STEPS = 1000
"""Timesteps of training."""

TIMESTEP = InputSpec(name="timestep", shape=(BATCH,), low=0, high=STEPS - 1)


class FlatDiT(Flat):
    """DiT, conditioned on a class."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """(B, C, h, h), (B,), (B,) -> (B, C or 2C, h, h)."""
        return self.ask(hidden_states=self.like(hidden_states), timestep=timestep, class_labels=class_labels)


def dit_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Height and width are fixed: it takes the root of the token count for both, and its position table is for one."""
    size = config["sample_size"]
    classes = config["num_embeds_ada_norm"] + 1  # one more says "no class"
    return (
        InputSpec(name="hidden_states", shape=(BATCH, config["in_channels"], size, size)),
        TIMESTEP,
        InputSpec(name="class_labels", shape=(BATCH,), dtype="int64", low=0, high=classes),
    )


class FlatPixArt(Flat):
    """PixArt alpha and sigma."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """(B, C, h, h), (B, N, D), (B,), (B, N), (B, 2), (B, 1) -> (B, C or 2C, h, h)."""
        torch._check(encoder_attention_mask.shape[0] == hidden_states.shape[0])
        return self.ask(
            hidden_states=self.like(hidden_states),
            encoder_hidden_states=self.like(encoder_hidden_states),
            timestep=timestep,
            added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
            encoder_attention_mask=encoder_attention_mask,
        )


def pixart_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Height and width are fixed: another size makes it compute another position table, in float64."""
    size = config["sample_size"]
    text = Dim(name="text", low=1, typical=120 if size < 128 else 300, high=512)
    width = config["caption_channels"] or config["cross_attention_dim"]
    specs = [
        InputSpec(name="hidden_states", shape=(BATCH, config["in_channels"], size, size)),
        InputSpec(name="encoder_hidden_states", shape=(BATCH, text, width)),
        TIMESTEP,
        InputSpec(name="encoder_attention_mask", shape=(BATCH, text), dtype="int64", low=0, high=2),
    ]
    asked = config["use_additional_conditions"]
    if asked or (asked is None and size == 128):  # as the network decides
        pixels = 8 * size
        specs += [
            InputSpec(name="resolution", shape=(BATCH, 2), low=pixels // 2, high=2 * pixels),
            InputSpec(name="aspect_ratio", shape=(BATCH, 1), low=0.25, high=4),
        ]
    return tuple(specs)


class FlatUNet(Flat):
    """The U-Net of Stable Diffusion 1, 2 and XL, and of their latent consistency models."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, C, h, w), (B,), (B, N, D), (B, G), (B, P), (B, 6) -> (B, C, h, w)."""
        added = None if text_embeds is None else {"text_embeds": self.like(text_embeds), "time_ids": time_ids}
        return self.ask(
            sample=self.like(sample),
            timestep=timestep,
            encoder_hidden_states=self.like(encoder_hidden_states),
            timestep_cond=None if timestep_cond is None else self.like(timestep_cond),
            added_cond_kwargs=added,
        )


def unet_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Height and width are multiples of what the network halves them to."""
    refuse_other_conditions(config)
    height, width = sides(config["sample_size"], 64)
    step = 2 ** (len(config["block_out_channels"]) - 1)
    context = config["cross_attention_dim"]
    context = context if isinstance(context, int) else context[0]
    text = Dim(name="text", low=1, typical=77, high=231)
    shape = (BATCH, config["in_channels"], side("height", height, step), side("width", width, step))
    specs = [
        InputSpec(name="sample", shape=shape),
        TIMESTEP,
        InputSpec(name="encoder_hidden_states", shape=(BATCH, text, context)),
    ]
    if config["time_cond_proj_dim"]:
        specs.append(InputSpec(name="timestep_cond", shape=(BATCH, config["time_cond_proj_dim"])))
    if config["addition_embed_type"] == "text_time":
        joint, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        ids = 5 if joint - 5 * each == context else 6  # XL's refiner has 5; its text is as wide as the pooled text
        specs += [
            InputSpec(name="text_embeds", shape=(BATCH, joint - ids * each)),
            InputSpec(name="time_ids", shape=(BATCH, ids), low=0, high=16 * max(height, width)),
        ]
    return tuple(specs)


def refuse_other_conditions(config: Config) -> None:
    """A U-Net may be conditioned in ways that no family here covers."""
    known = {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "attention_type": ("default",),
    }
    for key, values in known.items():
        if config[key] not in values:
            raise ToolchainError(
                f"this UNet2DConditionModel has {key} = {config[key]!r}, which is not covered",
                help="write its inputs in a model file of your own and use py:",
            )


class FlatSD3(Flat):
    """Stable Diffusion 3 and 3.5."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        """(B, C, h, w), (B, N, D), (B, P), (B,) -> (B, C, h, w)."""
        return self.ask(
            hidden_states=self.like(hidden_states),
            encoder_hidden_states=self.like(encoder_hidden_states),
            pooled_projections=self.like(pooled_projections),
            timestep=timestep,
        )


def sd3_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Height and width are multiples of the patch; the position table, cropped to them, bounds them."""
    size, patch = config["sample_size"], config["patch_size"]
    most = config["pos_embed_max_size"] * patch
    height, width = side("height", size, patch, most=most), side("width", size, patch, most=most)
    text = Dim(name="text", low=1, typical=333, high=589)  # 77 tokens of CLIP and 256, at most 512, of T5
    return (
        InputSpec(name="hidden_states", shape=(BATCH, config["in_channels"], height, width)),
        InputSpec(name="encoder_hidden_states", shape=(BATCH, text, config["joint_attention_dim"])),
        InputSpec(name="pooled_projections", shape=(BATCH, config["pooled_projection_dim"])),
        TIMESTEP,
    )


class FlatFlux(Flat):
    """Flux.

    Position ids are inputs, because the pipeline hands them over and they carry the picture's aspect. The rotary angles
    are computed from them in float32, as diffusers itself does on devices without float64: TensorRT has none.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        inner.pos_embed = FluxRotary(inner.pos_embed)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C), (B, N, D), (B, P), (B,), (T, 3), (N, 3), (B,) -> (B, T, C)."""
        return self.ask(
            hidden_states=self.like(hidden_states),
            encoder_hidden_states=self.like(encoder_hidden_states),
            pooled_projections=self.like(pooled_projections),
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
        )


class FluxRotary(nn.Module):
    """``FluxPosEmbed`` in float32: an id of 64, the last at 1024 pixels, has its angle within 1e-5."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.theta: float = original.theta
        self.widths: tuple[int, ...] = tuple(original.axes_dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(T, axes) -> cosine and sine, each (T, sum of widths)."""
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        axes = [
            get_1d_rotary_pos_embed(
                width,
                ids[:, axis].float(),  # type: ignore[arg-type]
                theta=self.theta,
                use_real=True,
                repeat_interleave_real=True,
                freqs_dtype=torch.float32,
            )
            for axis, width in enumerate(self.widths)
        ]
        return torch.cat([cos for cos, _ in axes], dim=-1), torch.cat([sin for _, sin in axes], dim=-1)


FLUX_IMAGE = Dim(name="image", low=256, typical=4096, high=8192)
FLUX_TEXT = Dim(name="text", low=1, typical=512, high=512)


def flux_inputs(
    config: Config, *, image: int | Dim = FLUX_IMAGE, text: int | Dim = FLUX_TEXT, side: int = 64
) -> tuple[InputSpec, ...]:
    """Image tokens are counted, so any height and width go; typical are 1024 x 1024 pixels.

    Args:
        config: diffusers' own.
        image: tokens of the image.
        text: tokens of the text.
        side: rows or columns of image tokens that positions are drawn from.
    """
    axes = len(config["axes_dims_rope"])
    specs = [
        InputSpec(name="hidden_states", shape=(BATCH, image, config["in_channels"])),
        InputSpec(name="encoder_hidden_states", shape=(BATCH, text, config["joint_attention_dim"])),
        InputSpec(name="pooled_projections", shape=(BATCH, config["pooled_projection_dim"])),
        InputSpec(name="timestep", shape=(BATCH,), low=0, high=1),
        InputSpec(name="img_ids", shape=(image, axes), low=0, high=side - 1),
        InputSpec(name="txt_ids", shape=(text, axes), low=0, high=0),
    ]
    if config["guidance_embeds"]:
        specs.append(InputSpec(name="guidance", shape=(BATCH,), low=1, high=5))
    return tuple(specs)


class FlatCogVideoX(Flat):
    """CogVideoX 1 and 1.5. The tuple of rotary tables is two inputs."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        ofs: Tensor | None = None,
        image_rotary_emb_0: Tensor | None = None,
        image_rotary_emb_1: Tensor | None = None,
    ) -> Tensor:
        """(B, F, C, h, w), (B, N, D), (B,), (1,), cosine and sine (T, head width) -> (B, F, C, h, w)."""
        return self.ask(
            hidden_states=self.like(hidden_states),
            encoder_hidden_states=self.like(encoder_hidden_states),
            timestep=timestep,
            ofs=ofs,
            image_rotary_emb=None if image_rotary_emb_0 is None else (image_rotary_emb_0, image_rotary_emb_1),
        )


def cogvideox_inputs(config: Config) -> tuple[InputSpec, ...]:
    """Frames, height and width may change only where positions are rotary tables; others have a table for one size."""
    patch, patch_t = config["patch_size"], config["patch_size_t"] or 1
    latent_frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    latent_frames = math.ceil(latent_frames / patch_t) * patch_t
    frames: int | Dim = latent_frames
    height: int | Dim = config["sample_height"]
    width: int | Dim = config["sample_width"]
    rotary = config["use_rotary_positional_embeddings"]
    if rotary and not config["use_learned_positional_embeddings"]:
        frames = side("frames", latent_frames, patch_t)
        height = side("height", config["sample_height"], patch)
        width = side("width", config["sample_width"], patch)
    text = config["max_text_seq_length"]  # fixed: prompts are padded to it
    specs = [
        InputSpec(name="hidden_states", shape=(BATCH, frames, config["in_channels"], height, width)),
        InputSpec(name="encoder_hidden_states", shape=(BATCH, text, config["text_embed_dim"])),
        TIMESTEP,
    ]
    if config["ofs_embed_dim"]:
        specs.append(InputSpec(name="ofs", shape=(1,), low=0, high=2))
    if rotary:
        tokens = product(frames, height, width, patches=patch_t * patch * patch)
        table = (tokens, config["attention_head_dim"])
        specs += [InputSpec(name=f"image_rotary_emb_{i}", shape=table, low=-1, high=1) for i in range(2)]
    return tuple(specs)


def product(*dims: int | Dim, patches: int) -> int | Dim:
    """How many tokens the dimensions make together."""
    if any(isinstance(dim, int) for dim in dims):
        return math.prod(dim.typical if isinstance(dim, Dim) else dim for dim in dims) // patches
    low, typical, high = (
        math.prod(getattr(dim, size) for dim in dims) // patches for size in ("low", "typical", "high")
    )
    return Dim(name="tokens", low=low, typical=typical, high=high)


DENOISERS = {
    "DiTTransformer2DModel": Family(flat=FlatDiT, inputs=dit_inputs),
    "PixArtTransformer2DModel": Family(flat=FlatPixArt, inputs=pixart_inputs),
    "UNet2DConditionModel": Family(flat=FlatUNet, inputs=unet_inputs),
    "SD3Transformer2DModel": Family(flat=FlatSD3, inputs=sd3_inputs),
    "FluxTransformer2DModel": Family(flat=FlatFlux, inputs=flux_inputs),
    "CogVideoXTransformer3DModel": Family(flat=FlatCogVideoX, inputs=cogvideox_inputs),
}
"""By class name in diffusers."""
