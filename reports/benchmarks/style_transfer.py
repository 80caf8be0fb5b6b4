"""What coupled rows take over from a picture of another style, on the digits that ``dit:digits`` draws.

    python -m enginewright.reports.benchmarks.style_transfer [--noises 2]

Writes ``reports/results/style_transfer.json``, with pictures, in two minutes on one thread. A digit that nothing was
trained on is made bold, or slanted, and goes along as the first row of every call, noised as far as the sampler is (as
FreeCus does; nothing is inverted). Digits of all ten classes are drawn beside it from the same noise, alone and coupled
by ``couple_streams``, and measured: how wide their strokes are, how far they lean, and whether the judge reads what was
asked for. ``way`` says how much of the distance between a digit drawn alone and the reference is gone.

Shapes: R references, K = 10 classes, S = 1 + K rows that belong together.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright import environment, sources
from enginewright.ground.signature import Array
from enginewright.models.blocks.ddpm import Process
from enginewright.models.blocks.digits import GUIDANCE, SAMPLER_STEPS, held_out, read
from enginewright.passes.attention.couple_streams import CoupleStreams
from enginewright.passes.contract import Context
from enginewright.passes.kernel.surgery import share
from enginewright.reports.pictures import png_grid

RESULTS = Path(__file__).resolve().parent.parent / "results" / "style_transfer.json"
MODEL, NONE, CLASSES = "dit:digits", 10, 10
Widths = npt.NDArray[np.float64]
"""One number for each picture, (n,)."""
REFERENCES = (2, 3, 5, 7)
"""Classes of the digits that carry the style: one of each."""
LEAN = 0.6
"""Columns that a slanted digit moves to the right for each row upwards."""

SETTINGS: dict[str, dict[str, Any]] = {
    "alignedgen": {"adain": True, "key_scale": 1.1},
    "softer": {"adain": True, "key_scale": 0.8},
    "last block": {"layers": ("blocks.3",)},
    "last block, louder": {"layers": ("blocks.3",), "key_scale": 1.5},
}
"""What is tried of ``couple_streams``."""


def bold(pictures: Tensor) -> Tensor:
    """Strokes a pixel wider on each side, (n, 1, 28, 28)."""
    return F.max_pool2d(pictures, 3, stride=1, padding=1)


def slanted(pictures: Tensor) -> Tensor:
    """Leaning to the right about the middle row, (n, 1, 28, 28)."""
    matrix = torch.tensor([[1.0, LEAN, 0.0], [0.0, 1.0, 0.0]]).expand(len(pictures), 2, 3)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures + 1, grid, align_corners=False) - 1


STYLES = {"bold": bold, "slanted": slanted}


def ink_of(pictures: Array) -> npt.NDArray[np.float64]:
    """(n, 1, 28, 28) in [-1, 1] -> (n, 28, 28) from 0, paper, to 1."""
    return (pictures[:, 0].astype(np.float64) + 1) / 2


def stroke_width(pictures: Array) -> Widths:
    """Mean width of the strokes in pixels, (n, 1, 28, 28) -> (n,): twice the ink over the length of its border."""
    ink = ink_of(pictures)
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    across, down = (np.abs(np.diff(padded, axis=axis)) for axis in (2, 1))
    border = np.hypot(across[:, :-1, :], down[:, :, :-1]).sum(axis=(1, 2))
    return 2 * ink.sum(axis=(1, 2)) / np.maximum(border, 1e-6)


def slant(pictures: Array) -> Widths:
    """Columns that a digit moves to the right for each row upwards, by its moments, (n, 1, 28, 28) -> (n,)."""
    ink = ink_of(pictures)
    ink = np.where(ink > 0.2, ink, 0)
    rows, columns = np.mgrid[: ink.shape[1], : ink.shape[2]]
    mass = np.maximum(ink.sum(axis=(1, 2)), 1e-6)
    y, x = ((ink * where).sum(axis=(1, 2)) / mass for where in (rows, columns))
    dy, dx = rows[None] - y[:, None, None], columns[None] - x[:, None, None]
    return -(ink * dx * dy).sum(axis=(1, 2)) / np.maximum((ink * dy * dy).sum(axis=(1, 2)), 1e-6)


MEASURES = {"bold": stroke_width, "slanted": slant}


def references(style: str) -> Tensor:
    """One digit of each reference class in a style, (R, 1, 28, 28)."""
    pictures, classes = held_out()
    first = [int(np.flatnonzero(classes == each)[0]) for each in REFERENCES]
    return STYLES[style](torch.from_numpy(pictures[first]))


@torch.no_grad()
def drawn(net: nn.Module, reference: Tensor, noise: Tensor, seed: int) -> Tensor:
    """Guided runs of ten digits beside each reference.

    Args:
        net: takes x, t and y; rows are a reference and the ten digits beside it, for each reference.
        reference: (R, 1, 28, 28).
        noise: where the digits start, (R, K, 1, 28, 28).
        seed: of the one noise that stays on the references.

    Returns:
        (R, K, 1, 28, 28).
    """
    process = Process()
    own = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed))
    y = torch.cat([torch.tensor(REFERENCES)[:, None], torch.arange(CLASSES).expand(len(reference), -1)], dim=1)
    labels = torch.cat([y.flatten(), torch.full((y.numel(),), NONE)])
    x, times = noise, process.timesteps(SAMPLER_STEPS)
    for now, then in zip(times, [*times[1:], -1], strict=True):
        t = torch.full((len(reference),), now)
        first = process.noisy(reference, t, own)
        rows = torch.cat([first[:, None], x], dim=1).flatten(0, 1)  # (R*S, 1, 28, 28)
        out = net(x=torch.cat([rows, rows]), t=torch.full((len(labels),), float(now)), y=labels)[:, :1]
        asked, free = (half.unflatten(0, y.shape)[:, 1:].flatten(0, 1) for half in out.chunk(2))
        image = process.image(x.flatten(0, 1), torch.full((len(asked),), now), free + GUIDANCE * (asked - free))
        kept = process.kept[now].float()
        eps = (x.flatten(0, 1) - kept.sqrt() * image) / (1 - kept).sqrt()
        left = process.kept[then].float() if then >= 0 else torch.ones(())
        x = (left.sqrt() * image + (1 - left).sqrt() * eps).unflatten(0, x.shape[:2])
    return x


def compared(style: str, alone: Tensor, coupled: Tensor, given: Tensor) -> dict[str, float]:
    """What was taken over, over all noises: digits (M, R, K, 1, 28, 28) beside references (R, 1, 28, 28)."""
    measure = MEASURES[style]
    before, after = (measure(each.flatten(0, 2).numpy()).reshape(each.shape[:3]) for each in (alone, coupled))
    wanted = measure(given.numpy())[None, :, None]
    change = (after - before).flatten()
    asked = np.tile(np.arange(CLASSES), change.size // CLASSES)
    error = float(change.std(ddof=1) / np.sqrt(change.size))
    return {
        "alone": rounded(before.mean()),
        "coupled": rounded(after.mean()),
        "reference": rounded(wanted.mean()),
        "change": rounded(change.mean()),
        "change_low": rounded(change.mean() - 1.96 * error),
        "change_high": rounded(change.mean() + 1.96 * error),
        "way": rounded(change.mean() / (wanted.mean() - before.mean())),
        "read_as_asked": rounded((read(coupled.flatten(0, 2).numpy())[0] == asked).mean()),
        "read_as_the_reference": rounded(copied(coupled)),
    }


def copied(digits: Tensor) -> float:
    """The share of digits of other classes than their reference's that are read as that one."""
    found = read(digits.flatten(0, 2).numpy())[0].reshape(digits.shape[:3])
    reference = np.array(REFERENCES)[None, :, None]
    others = np.broadcast_to(np.arange(CLASSES) != reference, found.shape)
    return float((found == reference)[others].mean())


def rounded(value: Any) -> float:
    """To 4 significant digits."""
    return float(f"{float(value):.4g}")


def main() -> None:
    """Draw, measure and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=2, help="runs for each reference and class")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    base = sources.load(MODEL).module
    shape = (chosen.noises, len(REFERENCES), CLASSES, 1, 28, 28)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    streams = 1 + CLASSES

    def runs(net: nn.Module, given: Tensor) -> Tensor:
        return torch.stack([drawn(net, given, each, seed) for seed, each in enumerate(noise)])

    found: dict[str, Any] = {}
    alone = runs(base, references("bold"))  # whichever: nobody reads it
    classes = np.tile(np.arange(CLASSES), alone.flatten(0, 2).shape[0] // CLASSES)
    right = rounded((read(alone.flatten(0, 2).numpy())[0] == classes).mean())
    for style in STYLES:
        given = references(style)
        shown = [given[:1], alone[0, 0]]
        found[style] = {}
        for name, settings in SETTINGS.items():
            net = CoupleStreams(streams=streams, **settings).apply(share(base), Context()).model
            coupled = runs(net, given)
            found[style][name] = compared(style, alone, coupled, given)
            shown += [given[:1], coupled[0, 0]]
        found[style]["pictures"] = png_grid(torch.cat(shown).numpy(), columns=streams)
    content = {
        "environment": environment.describe(),
        "versions": environment.versions(),
        "model": MODEL,
        "digits": int(np.prod(shape[:3])),
        "alone_read_as_asked": right,
        "settings": {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in s.items()} for name, s in SETTINGS.items()
        },
        "styles": found,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")
    for style, each in found.items():
        print(style)
        for name, row in each.items():
            print(" ", name, row if name != "pictures" else f"{len(row)} bytes")


if __name__ == "__main__":
    main()
