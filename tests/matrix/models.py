"""The small models that every pass is tried on, as model strings: other libraries', odd ones, and all of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from enginewright import catalog
from tests.toolchain.sources import tiny_diffusers as tiny

NETS = Path(__file__).parent / "nets.py"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def of_transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that builds a small model of transformers."""

    def build() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**{**SMALL, **settings}))
        return made

    return build


def of_diffusers(model: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that builds a small model of diffusers."""

    def build() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, model)(**settings)
        return made

    return build


PICTURES = {"image_size": 16, "patch_size": 4, "num_labels": 10}
TEXTS = {"vocab_size": 60, "max_position_embeddings": 40, "num_labels": 3}

FOLDERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "vit": ("hf", of_transformers("ViTForImageClassification", "ViTConfig", **PICTURES)),
    "deit": ("hf", of_transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig", **PICTURES)),
    "bert": ("hf", of_transformers("BertForSequenceClassification", "BertConfig", **TEXTS)),
    "roberta": ("hf", of_transformers("RobertaForSequenceClassification", "RobertaConfig", **TEXTS)),
    "llama": (
        "hf",
        of_transformers(
            "LlamaForCausalLM", "LlamaConfig", vocab_size=60, max_position_embeddings=40, num_key_value_heads=2
        ),
    ),
    "cliptext": (
        "hf",
        of_transformers(
            "CLIPTextModel",
            "CLIPTextConfig",
            vocab_size=100,
            max_position_embeddings=16,
            projection_dim=8,
            bos_token_id=98,
            eos_token_id=99,
        ),
    ),
    "ddit": (
        "diffusers",
        of_diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
    ),
    "pixart": ("diffusers", lambda: tiny.pixart(num_layers=4, num_attention_heads=4, cross_attention_dim=32)),
    "unet": ("diffusers", lambda: tiny.unet(block_out_channels=(16, 32), attention_head_dim=4)),
    "sd3": (
        "diffusers",
        of_diffusers(
            "SD3Transformer2DModel",
            sample_size=8,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=12,
            caption_projection_dim=32,
            pooled_projection_dim=10,
            in_channels=4,
            out_channels=4,
            pos_embed_max_size=6,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
    ),
    "cogvideox": ("diffusers", lambda: tiny.cogvideox(num_layers=3, num_attention_heads=4)),
    "vae": ("diffusers", lambda: tiny.autoencoder()),
}
"""Models from a folder: the source, and how the network is made."""

STRINGS = {
    "dit_tiny": "dit:tiny",
    "dit_digits": "dit:digits",
    "convolutions": f"py:{NETS}:convolutions",
    "tied": f"py:{NETS}:tied",
    "encoder": f"py:{NETS}:encoder",
    "recurrent": f"py:{NETS}:recurrent",
    "flux": f"py:{NETS}:flux",
}

STRINGS |= {name: f"{name}:tiny" for name in catalog.entries("models") if name != "dit"}
"""With every model of our own."""

NAMES = (*STRINGS, *FOLDERS)


def written(name: str, folder: Path) -> str:
    """The model string of a small model; its folder is written when it is not there."""
    if name in STRINGS:
        return STRINGS[name]
    source, build = FOLDERS[name]
    place = folder / name
    if not place.exists():
        module: Any = tiny.shaken(build())
        module.save_pretrained(place)
    return f"{source}:{place}" + ("#vae_decoder" if name == "vae" else "")
