"""HuBERT as Vevo uses it: a wave to features of 50 frames a second, what layer 18 of the large network gives.

Source: Hsu et al. 2021, arXiv:2106.07447 (HuBERT-Large); Zhang et al. 2025, arXiv:2502.07243, which reads layer 18. The
network is that of transformers (``HubertModel`` with stable layer norm), whose attribute names a released checkpoint
has. The layers above 18 are left out, and so is the norm behind the last one, which hidden states do not pass: what is
left gives ``hidden_states[18]`` of the whole network. Checked beside transformers' whole ``HubertModel``: equal
features with the same weights.

Shapes: B batch, S samples at 16 kHz, T frames, C features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from enginewright.ground.errors import require
from enginewright.ground.signature import Dim, InputSpec

RATE = 16_000
"""Samples a second that it reads."""
WINDOW, HOP = 400, 320
"""Samples that the first frame looks at, and from one frame to the next."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size: its layers, and other settings of transformers' ``HubertConfig``."""

    layers: int
    settings: dict[str, Any] = field(default_factory=dict)


LARGE = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
PUBLISHED = {"large-18": Config(layers=18, settings=LARGE)}
SHIPPED: dict[str, Config] = {}
TINY = Config(
    layers=2,
    settings={
        **LARGE,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
    },
)
OUTPUTS = ("features",)


class Features(nn.Module):
    """The layers of a HuBERT up to the one that is read."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        transformers = require("transformers", extra="transformers")
        settings = transformers.HubertConfig(
            num_hidden_layers=config.layers, apply_spec_augment=False, **config.settings
        )
        self.hubert = transformers.HubertModel(settings)
        self.hubert.encoder.layer_norm = nn.Identity()

    def forward(self, wave: Tensor) -> Tensor:
        """Wave (B, S), with zero mean and unit variance -> features (B, T, C)."""
        found: Tensor = self.hubert(wave, return_dict=False)[0]
        return found


def build(config: Config) -> Features:
    """The network, started at random."""
    return Features(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """A wave: by default of two seconds, at most of forty."""
    batch = Dim(name="batch", low=1, typical=1, high=4)
    samples = Dim(name="samples", low=WINDOW + HOP, typical=2 * RATE, high=40 * RATE)
    return (InputSpec(name="wave", role="sample", shape=(batch, samples)),)
