"""Vevo's two tokenizers: speech features to one code a frame, of 32 for content alone, of 8192 for content and style.

Source: Zhang et al. 2025, arXiv:2502.07243 (content and content-style tokens); the sizes are those of the authors'
released configurations. Checked against open-mmlab/Amphion at d3de90f (vevo_repcodec.py, repcodec_model.py): parameter
counts, equal codes and equal reconstructions with the same weights at the tiny sizes.

The features are those of layer 18 of HuBERT-Large, 50 a second; the content-style tokenizer wants them less their mean
and over their deviation, the content tokenizer as they are. Each tokenizer was trained with a decoder that rebuilds the
features from the codes; conversion does without it.

Departure: the projections around the codebook of 8192 are plain linear layers, where the authors' are convolutions of
kernel 1 under weight norm: fold its scale into the weight. So the encoder has 8 parameters fewer, the decoder 1024.

Shapes: B batch, T frames, C features, D width, E width of a code, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec
from enginewright.models.voice.vevo.vocoder import Backbone


@dataclass(frozen=True, kw_only=True)
class ContentConfig:
    """A size of the content tokenizer."""

    width: int = 1024
    features: int = 1024
    code_dim: int = 1024
    codes: int = 32
    blocks: int = 2
    units: int = 2


@dataclass(frozen=True, kw_only=True)
class ContentStyleConfig:
    """A size of the content-style tokenizer."""

    width: int = 384
    hidden: int = 2048
    depth: int = 12
    features: int = 1024
    code_dim: int = 8
    codes: int = 8192


TINY_CONTENT = ContentConfig(width=64, features=32, code_dim=32, codes=8)
TINY_CONTENT_STYLE = ContentStyleConfig(width=64, hidden=128, depth=2, features=32, codes=32)
PUBLISHED = {
    "content": ContentConfig(),
    "content-style": ContentStyleConfig(),
    "content-style-tiny": TINY_CONTENT_STYLE,
}
SHIPPED: dict[str, ContentConfig] = {}
TINY = TINY_CONTENT
OUTPUTS = ("codes",)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """X (B, T, E), codebook (K, E) -> the code at the least Euclidean distance (B, T) int64."""
    # |x|^2 is the same for every code, and left out.
    return (codebook.square().sum(-1) - 2 * x @ codebook.mT).argmin(-1)


class ResidualUnit(nn.Module):
    """Two convolutions without biases, of three frames and of one, each after an ELU, beside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv1d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, D, T) -> (B, D, T)."""
        return x + self.conv2(F.elu(self.conv1(F.elu(x))))


def residual_units(config: ContentConfig) -> list[nn.Module]:
    """The units of one block."""
    return [ResidualUnit(config.width) for _ in range(config.units)]


class ContentTokenizer(nn.Module):
    """Encode features by convolutions, and give each frame the nearest of a few codes: little but content fits."""

    codebook: Tensor

    def __init__(self, config: ContentConfig) -> None:
        super().__init__()
        self.config = config
        blocks: list[nn.Module] = []
        for _ in range(config.blocks):
            blocks += [*residual_units(config), nn.Conv1d(config.width, config.width, 3, padding=1)]
        self.encoder = nn.Sequential(nn.Conv1d(config.features, config.width, 3, padding=1, bias=False), *blocks)
        self.projector = nn.Conv1d(config.width, config.code_dim, 3, padding=1, bias=False)
        # Learned as moving averages, not by gradients; at the start as large as what it is compared with.
        self.register_buffer("codebook", 0.1 * torch.randn(config.codes, config.code_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, T, C) -> codes (B, T) int64."""
        return nearest(self.encode(features), self.codebook)

    def encode(self, features: Tensor) -> Tensor:
        """Features (B, T, C) -> what is compared with the codes (B, T, E)."""
        return self.projector(self.encoder(features.transpose(1, 2))).transpose(1, 2)


class ContentDecoder(nn.Module):
    """Rebuild features from content codes' vectors; for training alone."""

    def __init__(self, config: ContentConfig) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(config.blocks):
            blocks += [nn.Conv1d(config.width, config.width, 3, padding=1), *residual_units(config)]
        self.decoder = nn.Sequential(
            nn.Conv1d(config.code_dim, config.width, 3, padding=1, bias=False),
            *blocks,
            nn.Conv1d(config.width, config.features, 3, padding=1, bias=False),
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """Codebook vectors (B, T, E) -> features (B, T, C)."""
        return self.decoder(vectors.transpose(1, 2)).transpose(1, 2)


class ContentStyleTokenizer(nn.Module):
    """Encode normalised features by ConvNeXt blocks, and compare directions in a few dimensions with many codes."""

    def __init__(self, config: ContentStyleConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Backbone(config.features, config.width, config.hidden, config.depth)
        self.out = nn.Linear(config.width, config.features)
        self.in_project = nn.Linear(config.features, config.code_dim)
        self.codebook = nn.Embedding(config.codes, config.code_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, T, C), normalised -> codes (B, T) int64."""
        # A frame's own length decides nothing; at unit length it is not lost in the rounding of the codes' lengths.
        return nearest(F.normalize(self.encode(features), dim=-1), F.normalize(self.codebook.weight, dim=-1))

    def encode(self, features: Tensor) -> Tensor:
        """Features (B, T, C), normalised -> what is compared with the codes (B, T, E)."""
        return self.in_project(self.out(self.encoder(features.transpose(1, 2))))


class ContentStyleDecoder(nn.Module):
    """Rebuild normalised features from content-style codes' vectors; for training alone."""

    def __init__(self, config: ContentStyleConfig) -> None:
        super().__init__()
        self.out_project = nn.Linear(config.code_dim, config.features)
        self.decoder = Backbone(config.features, config.width, config.hidden, config.depth)
        self.out = nn.Linear(config.width, config.features)

    def forward(self, vectors: Tensor) -> Tensor:
        """Codebook vectors (B, T, E), as they are learned, not scaled to unit length -> features (B, T, C)."""
        return self.out(self.decoder(self.out_project(vectors).transpose(1, 2)))


def build(config: ContentConfig | ContentStyleConfig) -> ContentTokenizer | ContentStyleTokenizer:
    """The tokenizer that a size is of, started at random."""
    return ContentTokenizer(config) if isinstance(config, ContentConfig) else ContentStyleTokenizer(config)


def inputs(config: ContentConfig | ContentStyleConfig) -> tuple[InputSpec, ...]:
    """Features of two seconds of speech by default, at most of forty."""
    batch = Dim(name="batch", low=1, typical=1, high=4)
    frames = Dim(name="frames", low=1, typical=100, high=2000)
    return (InputSpec(name="features", role="sample", shape=(batch, frames, config.features)),)
