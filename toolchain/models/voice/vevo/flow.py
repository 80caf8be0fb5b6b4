"""Vevo's acoustic model: a flow-matching transformer from content-style codes to mel frames in a prompt's timbre.

Source: Zhang et al. 2025, arXiv:2502.07243 (acoustic modeling); the size is that of the authors' released
configuration. Checked against open-mmlab/Amphion at d3de90f (fmt_model.py, llama_nar.py): parameter count, order of
operations, and equal velocities with the same weights at the tiny size, with padding and without a condition. Attribute
names are theirs without ``diff_estimator.``; the two layers of an MLP are 0 and 2.

A layer is Llama's, with attention to every frame and with norms whose weights are linear in the embedded time. The time
enters nowhere else: for a fixed schedule ``norm_weights`` gives all of them beforehand, and ``from_norms`` is exact.

Departure: norms start at one, as the authors' class sets them; other layers start as torch's do, where theirs start
normal with standard deviation 0.02 and zero biases.

Shapes: B batch, T frames (50 a second), C mel channels, N layers, D width, H heads, E width of a head, S times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Dim, InputSpec
from enginewright.models.blocks.llama import Angles, Attention, GatedMlp, Rotary, scale_to_unit_rms
from enginewright.models.blocks.speech import RATE, excerpts
from enginewright.models.voice.vevo.mel import mel_frames
from enginewright.models.voice.vevo.sampling import STEPS, denormalize_mel, draw_mel
from enginewright.passes.traits import StreamBlock
from enginewright.validation.contract import SpectraTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of the flow. ``codes`` is the number of content-style codes, and the id that means "no condition"."""

    depth: int
    width: int
    heads: int
    hidden: int
    codes: int = 8192
    mels: int = 128
    longest: int = 4096
    """Most frames, prompt and all."""


PUBLISHED = {"emilia": Config(depth=16, width=1024, heads=16, hidden=4096)}
SHIPPED: dict[str, Config] = {}
TINY = Config(depth=2, width=64, heads=4, hidden=256, codes=32, longest=256)
OUTPUTS = ("velocity",)
JOB_NEEDS_TRAINING = False
"""Whether drawn frames say nothing of random weights: engines must draw what the model does with any."""

PROMPT = 50
DRAWN = 50
"""Mel frames of the timbre reference, and frames to draw after it, that figures are measured on: a second each."""
FRAMES_A_SECOND = 50


class AdaptiveRMSNorm(nn.Module):
    """Scale frames to unit root mean square, then by a weight that is linear in the embedded time."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.to_weight = nn.Linear(width, width)
        self.eps = eps
        nn.init.zeros_(self.to_weight.weight)
        nn.init.ones_(self.to_weight.bias)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """X (B, T, D), weight (B, D), which ``to_weight`` gave for the time -> (B, T, D)."""
        return weight[:, None] * scale_to_unit_rms(x, self.eps)


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time in [0, 1], whose rates fall from 1 to 1/10000."""

    rates: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        fall = torch.arange(width // 2) / (width // 2 - 1)
        self.register_buffer("rates", torch.exp(-math.log(10000) * fall), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """T (S,) -> (S, D)."""
        angle = t[:, None] * self.rates  # (S, D/2)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


def silu_mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a SiLU between them: (..., inputs) -> (..., outputs)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class FlowLayer(nn.Module, StreamBlock):
    """Attention to all frames and a gated feed-forward, each after an adaptive norm and beside a residual."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm = AdaptiveRMSNorm(width)
        self.self_attn = Attention(width, heads)
        self.post_attention_layernorm = AdaptiveRMSNorm(width)
        self.mlp = GatedMlp(width, hidden)

    def forward(self, x: Tensor, angles: Angles, mask: Tensor, time: Tensor) -> Tensor:
        """x (B, T, D), mask (B, 1, 1, T), the embedded time (B, D) -> (B, T, D)."""
        return self.from_norms(x, angles, mask, *self.norm_weights(time))

    def norm_weights(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded times (S, D) -> the weights of the two norms, each (S, D)."""
        return self.input_layernorm.to_weight(time), self.post_attention_layernorm.to_weight(time)

    def from_norms(self, x: Tensor, angles: Angles, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """``forward`` with the weights of the two norms, each (B, D), in the place of the time."""
        x = x + self.self_attn(self.input_layernorm(x, first), angles, mask=mask)
        return x + self.mlp(self.post_attention_layernorm(x, second))


class Flow(nn.Module):
    """Predict the velocity that carries noise to normalised mel frames, given a content-style code for every frame."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cond_emb = nn.Embedding(config.codes, width)
        self.cond_mlp = silu_mlp(width, 4 * width, width)
        self.mel_mlp = silu_mlp(config.mels, 4 * width, width)
        self.diff_step_embedding = TimeEmbedding(width)
        self.diff_step_mlp = silu_mlp(width, 4 * width, width)
        self.rotary = Rotary(width // config.heads, longest=config.longest)
        self.layers = nn.ModuleList(FlowLayer(width, config.heads, config.hidden) for _ in range(config.depth))
        self.norm = AdaptiveRMSNorm(width)
        self.mel_out_mlp = silu_mlp(width, 4 * width, config.mels)

    def forward(self, x: Tensor, t: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        """Predict dx/dt.

        Args:
            x: (B, T, C) the prompt's clean frames, then noisy ones, then padding.
            t: (B,) from 0 (noise) to 1 (mel).
            codes: (B, T) int64; ``config.codes`` where there is no condition.
            mask: (B, T) 1 for frames, 0 for padding; every sample has a frame.

        Returns:
            Velocity (B, T, C); where the mask is 0 it means nothing.
        """
        h, angles, visible = self.start(x, codes, mask)
        time = self.diff_step_mlp(self.diff_step_embedding(t))  # (B, D)
        for layer in self.layers:
            h = layer(h, angles, visible, time)
        return self.mel_out_mlp(self.norm(h, self.norm.to_weight(time)))

    def start(self, x: Tensor, codes: Tensor, mask: Tensor) -> tuple[Tensor, Angles, Tensor]:
        """What the layers read: frames (B, T, D), angles of their places, and which are visible (B, 1, 1, T)."""
        angles = self.rotary(torch.arange(x.shape[1], device=x.device)[None])
        return self.mel_mlp(x) + self.condition(codes), angles, mask[:, None, None, :] > 0.5

    def norm_weights(self, t: Tensor) -> Tensor:
        """T (S,) -> the weights (S, 2N+1, D) of all norms in order, the last one's last."""
        time = self.diff_step_mlp(self.diff_step_embedding(t))  # (S, D)
        pairs = [weight for layer in self.layers for weight in layer.norm_weights(time)]  # type: ignore[operator]
        return torch.stack([*pairs, self.norm.to_weight(time)], dim=1)

    def from_norms(self, x: Tensor, norms: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        """``forward`` with the weights of all norms (B, 2N+1, D) in the place of the time."""
        h, angles, visible = self.start(x, codes, mask)
        *pairs, last = norms.unbind(1)  # each (B, D)
        for layer, first, second in zip(self.layers, pairs[0::2], pairs[1::2], strict=True):
            h = layer.from_norms(h, angles, visible, first, second)  # type: ignore[operator]
        return self.mel_out_mlp(self.norm(h, last))

    def condition(self, codes: Tensor) -> Tensor:
        """Codes (B, T) -> (B, T, D), the same at every time; "no condition" is a zero before the MLP."""
        known = (codes < self.config.codes)[..., None]
        return self.cond_mlp(self.cond_emb(codes.clamp(max=self.config.codes - 1)) * known)


def build(config: Config) -> Flow:
    """The flow, started at random."""
    return Flow(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Noisy frames, a time, a code for each frame (one more stands for none), and which frames are no padding."""
    batch = Dim(name="batch", low=1, typical=1, high=4)
    frames = Dim(name="frames", low=1, typical=config.longest // 8, high=config.longest)
    return (
        InputSpec(name="x", role="sample", shape=(batch, frames, config.mels)),
        InputSpec(name="t", role="timestep", shape=(batch,), low=0, high=1),
        InputSpec(name="codes", role="condition", shape=(batch, frames), dtype="int64", low=0, high=config.codes + 1),
        InputSpec(name="mask", role="mask", shape=(batch, frames), default=1),
    )


def task(size: str, config: Config) -> SpectraTask:
    """Mel frames that go on from a second of speech, for codes at random, drawn in 32 guided steps."""

    def sample(runner: Runner, n: int, seed: int) -> Array:
        def velocity(x: Tensor, t: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
            call = {"x": x.numpy(), "t": t.numpy(), "codes": codes.numpy(), "mask": mask.numpy()}
            return torch.from_numpy(next(iter(runner(call).values())))

        drawn = [draw_mel(velocity, *one, none=config.codes) for one in starts(config, n, seed)]
        return np.concatenate([denormalize_mel(mel.mT).numpy() for mel in drawn])

    return SpectraTask(sample=sample, samples=2, calls=lambda n: 2 * STEPS * n, rate=RATE)


def starts(config: Config, n: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each sample the frames of a prompt (1, P, C), codes (1, P + T), and noise (1, T, C)."""
    sounds = excerpts(n, PROMPT * RATE // FRAMES_A_SECOND, seed)
    prompts = mel_frames(sounds, bands=config.mels).mT  # (n, P, C)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codes, (n, PROMPT + DRAWN), generator=generator)
    noise = torch.randn(n, DRAWN, config.mels, generator=generator)
    return list(zip(prompts.split(1), codes.split(1), noise.split(1), strict=True))
