"""What head selection does for the digits that ``dit:digits`` draws, and for how well it stands the loss of heads.

    python -m enginewright.reports.benchmarks.head_guidance [--samples 200] [--search-samples 20] [--candidates 6]

Writes ``reports/results/head_guidance.json``. Two searches with scores that are built in, on one thread:

* guidance: heads of the later two blocks, tried on a few guided sampling runs (``judged_as_asked``), then judged on
  other noise beside the plain network;
* pruning: four heads taken out greedily by ``fidelity``, beside ``prune_heads`` with as many, on held-out inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from enginewright import environment
from enginewright.calibration import VALIDATION_SEED
from enginewright.passes.contract import Plan
from enginewright.pipeline import Run
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.sources.contract import Model
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.validation.contract import SampleMetric, SamplingTask
from enginewright.validation.fidelity import compare
from enginewright.validation.metrics import load_metrics

RESULTS = Path(__file__).resolve().parent.parent / "results" / "head_guidance.json"
MODEL = "dit:digits"
HELD_OUT = 7
"""Seed of the noise that is judged; the search draws from another."""


def optimized(step: dict[str, Any], samples: int = 1) -> tuple[Model, nn.Module, Plan, float]:
    """Carry one step out; the untouched model, the new one, the plan and CPU seconds."""
    validation = {"threads": 1, "samples": samples}
    run = Run(make({"model": MODEL, "steps": [step], "validation": validation}), Progress(quiet=True))
    began = time.process_time()
    module = run.optimize()
    return run.model, module, run.results[0][1].plan, round(time.process_time() - began, 1)


def judged(model: Model, modules: dict[str, nn.Module], samples: int) -> dict[str, dict[str, float]]:
    """Metrics of whole sampling runs from the same noise."""
    task = model.task
    assert isinstance(task, SamplingTask)
    drawn = {
        name: task.drawn(task.sample(EagerRunner(module, threads=1, outputs=model.outputs), samples, HELD_OUT))
        for name, module in modules.items()
    }
    metrics = {
        label: metric
        for label, metric in load_metrics().items()
        if isinstance(metric, SampleMetric) and (label == "judged_as_asked" or samples >= task.floor)
    }
    return {
        name: {
            label: float(f"{metric.measure(task, drawn['plain'], each):.6g}")
            for label, metric in metrics.items()
            if label in ("judged_as_asked", "frechet_distance", "frechet_ratio")
        }
        for name, each in drawn.items()
    }


def guidance(samples: int, search_samples: int, candidates: int) -> dict[str, Any]:
    """Search for two heads to perturb, and judge them."""
    step = {
        "pass": "select_heads",
        "score": "judged_as_asked",
        "layers": ["blocks.2.*", "blocks.3.*"],
        "heads_per_round": 2,
        "candidates": candidates,
        "channels": 1,
        "baked": True,
    }
    model, module, plan, seconds = optimized(step, search_samples)
    began = time.process_time()
    figures = judged(model, {"plain": model.module, "guided": module}, samples)
    return {
        "step": step,
        "search": {"samples": search_samples, "cpu_seconds": seconds, **plan.facts.as_json()},
        "judged": {"samples": samples, "cpu_seconds": round(time.process_time() - began, 1), **figures},
    }


def pruning(heads: int = 4) -> dict[str, Any]:
    """Relative L2 error on held-out inputs after four of the 24 heads are gone, by who chose them."""
    steps = {
        "select_heads": {"pass": "select_heads", "mode": "prune", "score": "fidelity", "rounds": heads},
        "weight_norm": {"pass": "prune_heads", "share": 1 / 6},
        "taylor": {"pass": "prune_heads", "share": 1 / 6, "importance": "taylor"},
    }
    found: dict[str, Any] = {}
    for name, step in steps.items():
        model, module, plan, seconds = optimized(step)
        calls = model.batches(16, VALIDATION_SEED)
        wanted, got = (
            [EagerRunner(net, threads=1, outputs=model.outputs)(call) for call in calls]
            for net in (model.module, module)
        )
        errors = [compare([w], [g])[0].worst["relative_l2"] for w, g in zip(wanted, got, strict=True)]
        found[name] = {
            "removed": {path: entry.removed for path, entry in plan.choice.items()},
            "relative_l2_mean": float(f"{np.mean(errors):.6g}"),
            "relative_l2_worst": float(f"{max(errors):.6g}"),
            "cpu_seconds": seconds,
        }
    return found


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="sampling runs that are judged")
    parser.add_argument("--search-samples", type=int, default=20, help="sampling runs for each score of the search")
    parser.add_argument("--candidates", type=int, default=6, help="heads that the search tries")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "environment": environment.describe(),
        "versions": environment.versions(),
        "pruning_4_of_24_heads": pruning(),
        "guidance": guidance(chosen.samples, chosen.search_samples, chosen.candidates),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
