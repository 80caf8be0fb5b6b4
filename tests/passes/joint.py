"""Small SD3 and Flux networks with random weights, 4 heads of 8 features in every layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from enginewright.ground.signature import Dim, InputSpec, Signature
from tests.passes.conftest import Subject, randomise

HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "joint_attention_dim": 12, "pooled_projection_dim": 10}


def sd3() -> Subject:
    """Three blocks: one with a second attention over the image alone, and the last, which gives no text."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        caption_projection_dim=32,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **HEADS,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([3.0, 700.0]),
    }
    attentions = ("0.attn", "0.attn2", "1.attn", "2.attn")
    return Subject(
        model=randomise(model), inputs=inputs, paths=tuple(f"transformer_blocks.{name}" for name in attentions)
    )


def flux() -> Subject:
    """Two double blocks and two single ones."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, axes_dims_rope=(2, 2, 4), guidance_embeds=True, **HEADS
    )
    ids = torch.stack([torch.zeros(9), torch.arange(9) // 3, torch.arange(9) % 3], dim=1)
    inputs = {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    blocks = ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
    singles = ("single_transformer_blocks.0", "single_transformer_blocks.1")
    return Subject(model=randomise(model), inputs=inputs, paths=(*blocks, *singles))


JOINT: dict[str, Callable[[], Subject]] = {"sd3": sd3, "flux": flux}


def sharing(*names: str, **ranges: tuple[float, float]) -> Signature:
    """A signature in which these inputs have no row for each sample, and others have these ranges."""
    rows = Dim(name="batch", low=1, typical=2, high=8)
    shared = [InputSpec(name=name, shape=(5, 3)) for name in names]
    others = [InputSpec(name=name, shape=(rows,), low=low, high=high) for name, (low, high) in ranges.items()]
    return Signature((InputSpec(name="rows", shape=(rows,)), *shared, *others))
