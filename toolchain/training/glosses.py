"""Train ``wide_attention:glosses-deep`` and ``:glosses-wide`` to tell which part of speech a gloss of WordNet is of.

    python -m enginewright.training.glosses wide --data /usr/share/wordnet   # about 5 minutes on one core
    python -m enginewright.training.glosses deep --data /usr/share/wordnet   # about 12

Needs WordNet 3.0's ``data.noun`` and so on (Debian: wordnet-base). Examples in quotation marks are left out, as is a
gloss that stands under two parts of speech. Classes come alike often, though nouns are most of the dictionary. Both
networks get the same glosses in the same order. Weights and the glosses held out go to toolchain/models/weights.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from enginewright.models.blocks.digits import WEIGHTS
from enginewright.models.blocks.glosses import CLASSES, call_of
from enginewright.models.language import wide_attention

SEED, HELD_OUT = 0, 250
"""Of each class this many glosses are held out."""


def read(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """WordNet's licence, and the glosses of each class in an order drawn from ``SEED``."""
    found: dict[str, dict[str, None]] = {}
    for name in CLASSES:
        lines = (folder / f"data.{name}").read_text(encoding="utf-8").splitlines()
        licence = "\n".join(line for line in lines if line.startswith("  "))
        glosses = (line.partition("| ")[2] for line in lines if not line.startswith("  "))
        found[name] = dict.fromkeys(cleaned for gloss in glosses if (cleaned := without_examples(gloss)))
    all_of_them = [gloss for each in found.values() for gloss in each]
    twice = {gloss for gloss in all_of_them if sum(gloss in each for each in found.values()) > 1}
    shuffled = {}
    for name, each in found.items():
        shuffled[name] = [gloss for gloss in each if gloss not in twice]
        random.Random(SEED).shuffle(shuffled[name])
    return licence, shuffled


def without_examples(gloss: str) -> str:
    """The definition alone."""
    return re.sub(r'\s*"[^"]*"?', "", gloss.replace("\t", " ")).strip(" ;")


def write_held_out(licence: str, glosses: dict[str, list[str]]) -> None:
    """Write what is held out, the classes in turns, below the licence."""
    turns = zip(*(glosses[name][:HELD_OUT] for name in CLASSES), strict=True)
    lines = [f"{name}\t{gloss}" for turn in turns for name, gloss in zip(CLASSES, turn, strict=True)]
    (WEIGHTS / "glosses-test.txt").write_text("\n".join([licence, *lines]) + "\n", encoding="utf-8")


def accuracy(net: nn.Module, glosses: dict[str, list[str]]) -> float:
    """The share of the glosses held out whose class is told."""
    right = 0
    net.eval()
    with torch.no_grad():
        for number, name in enumerate(CLASSES):
            for start in range(0, HELD_OUT, 50):
                call = call_of(glosses[name][start : start + 50])
                logits = net(**{key: torch.from_numpy(array) for key, array in call.items()})
                right += int((logits.argmax(dim=1) == number).sum())
    return right / (HELD_OUT * len(CLASSES))


def train(size: str, folder: Path, *, updates: int, batch: int, rate: float) -> None:
    """Train one network, and write it."""
    torch.manual_seed(SEED)
    licence, glosses = read(folder)
    write_held_out(licence, glosses)
    net = wide_attention.build(wide_attention.SHIPPED[f"glosses-{size}"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates, pct_start=0.1)
    seen = [glosses[name][HELD_OUT:] for name in CLASSES]
    draw, began = random.Random(SEED), time.monotonic()
    for update in range(updates):
        classes = [draw.randrange(len(CLASSES)) for _ in range(batch)]
        call = call_of(draw.choice(seen[number]) for number in classes)
        net.train()
        logits = net(**{key: torch.from_numpy(array) for key, array in call.items()})
        loss = F.cross_entropy(logits, torch.tensor(classes))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (update + 1) % 500 == 0:
            seconds = time.monotonic() - began
            print(
                f"{size} update {update + 1} loss {loss.item():.3f} test {accuracy(net, glosses):.4f} {seconds:.0f} s",
                flush=True,
            )
    save_file(net.state_dict(), WEIGHTS / f"wide_attention-glosses-{size}.safetensors")


def main() -> None:
    """Train one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=["wide", "deep"])
    parser.add_argument("--data", type=Path, required=True, help="folder of WordNet's data files")
    parser.add_argument("--updates", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    chosen = parser.parse_args()
    train(chosen.size, chosen.data, updates=chosen.updates, batch=chosen.batch, rate=chosen.rate)


if __name__ == "__main__":
    main()
