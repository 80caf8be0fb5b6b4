"""Vevo as a whole: a voice says what another said, from wave to wave, by six networks.

Source: Zhang et al. 2025, arXiv:2502.07243 (voice conversion in the style and the timbre of a reference); the order of
things is that of the authors' pipeline. Checked against open-mmlab/Amphion at d3de90f (vevo_utils.py).

Departures, so that a run tells what engines change and not what chance does: tokens are the likeliest, not drawn, among
those of content and style, and as many as the source has frames; features are brought to zero mean and unit variance by
their own figures, where the authors have those of their training data; speech is the shipped recording. Weights are
random: what is said is no speech, and engines must say the same.

Shapes: B batch, always 1, R frames of the reference, S of the source, 50 a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Arrays
from enginewright.models.blocks.decoding import call_of
from enginewright.models.blocks.speech import RATE, excerpts
from enginewright.models.voice.vevo import decoder, flow, hubert
from enginewright.models.voice.vevo.mel import mel_frames
from enginewright.models.voice.vevo.sampling import draw_mel
from enginewright.sources.jobs import Job

RUNS = 2
"""Conversions that engines are tried on."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size of the whole.

    Args:
        parts: for each part the model that it is.
        decoder: its configuration.
        flow: its configuration.
        frames: of the reference, and of the source; a sequence of the tiny decoder is short.
    """

    parts: Mapping[str, str]
    decoder: decoder.Config
    flow: flow.Config
    frames: int


SIZES = {
    "tiny": Size(
        parts={
            "hubert": "vevo-hubert:tiny",
            "content": "vevo-tokenizers:tiny",
            "style": "vevo-tokenizers:content-style-tiny",
            "decoder": "vevo-decoder:tiny",
            "flow": "vevo-flow:tiny",
            "vocoder": "vevo-vocoder:tiny",
        },
        decoder=decoder.TINY,
        flow=flow.TINY,
        frames=8,
    ),
    "conversion": Size(
        parts={
            "hubert": "vevo-hubert:large-18",
            "content": "vevo-tokenizers:content",
            "style": "vevo-tokenizers:content-style",
            "decoder": "vevo-decoder:conversion",
            "flow": "vevo-flow:emilia",
            "vocoder": "vevo-vocoder:emilia",
        },
        decoder=decoder.PUBLISHED["conversion"],
        flow=flow.PUBLISHED["emilia"],
        frames=50,
    ),
}


def job(size: str, *, prompts: Sequence[str], steps: int, arguments: Mapping[str, Any]) -> Job:
    """Conversions of stretches of the shipped speech.

    Args:
        size: of ``SIZES``.
        prompts: must be none; what is said is the recording's.
        steps: of the flow; the authors take 32.
        arguments: must be none.

    Raises:
        ToolchainError: it was given texts, or arguments.
    """
    if prompts or arguments:
        raise ToolchainError("Vevo's job takes neither prompts nor arguments: it converts speech", where="job")
    chosen = SIZES[size]
    return Job(
        parts=tuple(chosen.parts),
        calls=tuple({"number": np.array([i])} for i in range(RUNS)),
        assemble=lambda networks: converting(networks, chosen, steps),
        run=lambda convert: convert,
        models=chosen.parts,
        rate=RATE,
        notes=(f"{RUNS} conversions of shipped speech, {steps} steps of the flow, likeliest tokens",),
    )


def converting(networks: Mapping[str, Runner], size: Size, steps: int) -> Runner:
    """A runner of conversions: the number of one -> its content-style codes (1, S) and its wave (1, samples)."""
    frames = size.frames

    def only(part: str, **given: Array) -> Array:
        return next(iter(networks[part](given).values()))

    def convert(inputs: Arrays) -> Arrays:
        number = int(inputs["number"][0])
        sounds = excerpts(2, frames * RATE // 50, number)  # the reference, then the source
        features = only("hubert", wave=at_16_khz(sounds.reshape(1, -1)))
        content = torch.from_numpy(only("content", features=features))[0]
        reference = centred(features[:, :frames])
        style = torch.from_numpy(only("style", features=reference))
        new = continued(networks["decoder"], size.decoder, content, style, frames)
        prompt = mel_frames(sounds[:1]).mT  # (1, R, C)
        noise = torch.randn(1, frames, prompt.shape[-1], generator=torch.Generator().manual_seed(number))

        def velocity(x: Tensor, t: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
            given = {"x": x, "t": t, "codes": codes, "mask": mask}
            return torch.from_numpy(only("flow", **{name: value.numpy() for name, value in given.items()}))

        codes = torch.cat([style, torch.from_numpy(new)], dim=1)
        mel = draw_mel(velocity, prompt, codes, noise, none=size.flow.codes, steps=steps)
        return {"codes": new, "wave": only("vocoder", mel=np.ascontiguousarray(mel.mT.numpy()))}

    return convert


def at_16_khz(wave: Array) -> Array:
    """Sounds (B, N) at 24 kHz -> (B, 2 N / 3 and a little) at 16 kHz, as HuBERT reads them.

    Frequencies above 8 kHz are left out; the silence behind the end gives the last frame its whole window.
    """
    count = wave.shape[1] * hubert.RATE // RATE
    spectrum = np.fft.rfft(wave)[:, : count // 2 + 1]
    found = np.fft.irfft(spectrum, count) * count / wave.shape[1]
    level = (found - found.mean()) / found.std()
    return np.pad(level, ((0, 0), (0, hubert.WINDOW - hubert.HOP))).astype(np.float32)


def centred(features: Array) -> Array:
    """Features (B, T, C) less the mean of each over the frames, over its deviation."""
    deviation = features.std(axis=1, keepdims=True)
    return ((features - features.mean(axis=1, keepdims=True)) / (deviation + 1e-5)).astype(np.float32)


def continued(network: Runner, config: decoder.Config, content: Tensor, style: Tensor, count: int) -> Array:
    """Content-style codes that go on from those of a reference.

    Args:
        network: the decoder.
        config: its vocabulary.
        content: codes (R + S,) of reference and source.
        style: codes (1, R) of the reference.
        count: how many to go on by.

    Returns:
        (1, count): each the likeliest of all content-style codes.
    """
    given = decoder.without_repeats(content)[None] + config.texts
    ids, position = decoder.sequence(config, given, style).numpy(), 0
    found = []
    for _ in range(count):
        logits = next(iter(network(call_of(ids, position)).values()))
        position += ids.shape[1]
        ids = logits[:, : config.outputs].argmax(-1)[:, None]
        found.append(ids)
    return np.concatenate(found, axis=1)
