"""Vocos, as Vevo uses it: ConvNeXt blocks at the frame rate, then magnitudes and phases, then one inverse transform.

Source: Siuzdak 2023, arXiv:2306.00814, section 3; the size is that of Vevo's released configuration (Zhang et al.
2025, arXiv:2502.07243). Checked against open-mmlab/Amphion at d3de90f (amphion_codec/vocos.py): parameter count, and
equal waves with the same weights at the tiny size. Attribute names are theirs.

Departure: the inverse Fourier transform, the window and the overlapping sum are one transposed convolution whose kernel
holds the windowed basis, because engines refuse the transform; the result is theirs to rounding. As in the released
configuration, frames are padded "same": half of what a frame overlaps is cut from each end, so that T frames give
exactly T hops.

Shapes: B batch, C mel channels, T frames, D width, F samples of a frame (``n_fft``), K = F/2 + 1 bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Arrays, Dim, InputSpec
from enginewright.models.blocks.speech import RATE, excerpts
from enginewright.models.voice.vevo.mel import mel_frames
from enginewright.passes.traits import StreamBlock
from enginewright.validation.contract import SoundTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of the vocoder. ``n_fft`` and ``hop`` are in samples, and their difference is even."""

    depth: int
    width: int
    hidden: int
    mels: int = 128
    n_fft: int = 1920
    hop: int = 480


PUBLISHED = {"emilia": Config(depth=30, width=1024, hidden=4096)}
SHIPPED: dict[str, Config] = {}
TINY = Config(depth=2, width=64, hidden=128)
OUTPUTS = ("wave",)
JOB_NEEDS_TRAINING = False
"""Whether waves of speech say nothing of random weights: engines must make the model's wave with any."""

TYPICAL_FRAMES = 100
"""Two seconds of speech, at the hop of the released configuration."""


class ConvNeXtBlock(nn.Module, StreamBlock):
    """A depthwise convolution over seven frames and an MLP, scaled feature by feature, beside a residual."""

    def __init__(self, width: int, hidden: int, *, scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """X (B, D, T) -> (B, D, T)."""
        y = self.norm(self.dwconv(x).transpose(1, 2))  # (B, T, D)
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.transpose(1, 2)


class Backbone(nn.Module):
    """A convolution into the width, then ConvNeXt blocks between two norms; every frame stays a frame."""

    def __init__(self, inputs: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(inputs, width, 7, padding=3)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.convnext = nn.ModuleList(ConvNeXtBlock(width, hidden, scale=1 / depth) for _ in range(depth))
        self.final_layer_norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, T) -> (B, T, D)."""
        h = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)  # (B, D, T)
        for block in self.convnext:
            h = block(h)
        return self.final_layer_norm(h.transpose(1, 2))


def initialize(module: nn.Module) -> None:
    """Start a convolution or a linear layer: truncated normal, standard deviation 0.02, no bias."""
    if isinstance(module, nn.Conv1d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def windowed_basis(n_fft: int) -> Tensor:
    """What each bin's real part, then each one's imaginary part, adds to a frame under a Hann window -> (2K, 1, F).

    The imaginary parts of the first and the last bin add nothing, as in an inverse transform to real samples.
    """
    bins = torch.arange(n_fft // 2 + 1)[:, None]
    samples = torch.arange(n_fft)[None]
    angle = 2 * math.pi * (bins * samples % n_fft).double() / n_fft  # (K, F)
    twice = torch.full((len(bins), 1), 2.0, dtype=torch.float64)  # a bin between the ends stands for its mirror too
    twice[0] = twice[-1] = 1
    real, imaginary = twice * angle.cos() / n_fft, -twice * angle.sin() / n_fft
    return (torch.cat([real, imaginary]) * hann(n_fft)).float()[:, None]


def hann(n_fft: int) -> Tensor:
    """The periodic Hann window in float64 -> (F,)."""
    return torch.hann_window(n_fft, dtype=torch.float64)


class ISTFTHead(nn.Module):
    """Project features to logarithmic magnitudes and phases, and add up the windowed frames that they describe."""

    basis: Tensor
    energy: Tensor

    def __init__(self, width: int, n_fft: int, hop: int) -> None:
        super().__init__()
        self.hop = hop
        self.cut = (n_fft - hop) // 2
        self.out = nn.Linear(width, n_fft + 2)
        self.register_buffer("basis", windowed_basis(n_fft), persistent=False)  # (2K, 1, F)
        self.register_buffer("energy", hann(n_fft).square().float()[None, None], persistent=False)  # (1, 1, F)

    def forward(self, h: Tensor) -> Tensor:
        """H (B, T, D) -> wave (B, hop * T)."""
        magnitude, phase = self.out(h).transpose(1, 2).chunk(2, dim=1)  # each (B, K, T)
        magnitude = magnitude.exp().clamp(max=100.0)
        return self.wave(torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], dim=1))

    def wave(self, spectrum: Tensor) -> Tensor:
        """Real parts, then imaginary parts (B, 2K, T) -> wave (B, hop * T)."""
        frames = F.conv_transpose1d(spectrum, self.basis, stride=self.hop, padding=self.cut)  # (B, 1, hop * T)
        # What the windows add up to: the same for every input, and constant but near the two ends.
        ones = torch.ones_like(spectrum[:1, :1])
        envelope = F.conv_transpose1d(ones, self.energy, stride=self.hop, padding=self.cut)  # (1, 1, hop * T)
        return (frames / envelope)[:, 0]


class Vocoder(nn.Module):
    """Turn normalised mel frames into a wave."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.mels, config.width, config.hidden, config.depth)
        self.head = ISTFTHead(config.width, config.n_fft, config.hop)

    def forward(self, mel: Tensor) -> Tensor:
        """Mel (B, C, T), 50 frames a second -> wave (B, hop * T), 24 kHz."""
        return self.head(self.backbone(mel))


def build(config: Config) -> Vocoder:
    """The vocoder, started at random."""
    return Vocoder(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Normalised mel frames: by default of two seconds, at most of forty."""
    batch = Dim(name="batch", low=1, typical=1, high=4)
    frames = Dim(name="frames", low=1, typical=TYPICAL_FRAMES, high=2000)
    return (InputSpec(name="mel", role="sample", shape=(batch, config.mels, frames)),)


def task(size: str, config: Config) -> SoundTask:
    """Waves of two seconds of speech each, from its mel frames."""

    def sample(runner: Runner, n: int, seed: int) -> Array:
        waves = [next(iter(runner(call).values())) for call in speech(config, n, seed)]
        return np.concatenate(waves)

    return SoundTask(sample=sample, samples=4, calls=lambda n: n, rate=RATE)


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]]:
    """Mel frames of speech."""
    return lambda count, seed: speech(config, count, seed)


def speech(config: Config, count: int, seed: int) -> list[Arrays]:
    """``count`` calls with mel frames of two seconds of speech each."""
    sounds = excerpts(count, TYPICAL_FRAMES * config.hop, seed)
    mel = mel_frames(sounds, n_fft=config.n_fft, hop=config.hop, bands=config.mels).numpy()  # (count, C, T)
    return [{"mel": one[None]} for one in mel]
