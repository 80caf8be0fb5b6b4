"""What head selection does for the digits that ``dit:digits`` draws, and for how well it stands the loss of heads.

    python -m enginewright.reports.benchmarks.head_guidance [--part PART] [--samples 200] [--search-samples 20]
                                                            [--candidates 6]

Writes ``reports/results/head_guidance.json``, on one thread:

* guidance: heads of the later two blocks, tried on a few guided sampling runs (``judged_as_asked``), then judged on
  other noise beside the plain network;
* pruning: four heads taken out greedily by ``fidelity``, beside ``prune_heads`` with as many, on held-out inputs;
* objectives: as the authors search, without guidance by class and in few sampler steps: the six heads that raise an
  objective most, each tried alone, beside the six of the best whole layer, for each strength and weight. All is chosen
  on one noise and judged on another. The objectives are the distance to real digits, the ink of a stroke, its slant,
  and the distance to the boldest quarter of real digits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enginewright import environment
from enginewright.calibration import CALIBRATION_SEED, VALIDATION_SEED
from enginewright.ground.signature import Array
from enginewright.models.blocks.ddpm import Process
from enginewright.models.blocks.digits import AT_ONCE, held_out, read, start
from enginewright.passes.contract import Context, Plan, Score
from enginewright.passes.heads.perturb_heads import PerturbHeads
from enginewright.passes.heads.select_heads import SelectHeads
from enginewright.passes.heads.softpag import BlendedHeads
from enginewright.passes.kernel.surgery import share
from enginewright.passes.traits import HeadedAttention, layers_of
from enginewright.pipeline import Run
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.sources.contract import Model
from enginewright.state import first_state
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.validation.contract import SampleMetric, SamplingTask
from enginewright.validation.fidelity import compare
from enginewright.validation.metrics import load_metrics
from enginewright.validation.statistics import frechet_distance

RESULTS = Path(__file__).resolve().parent.parent / "results" / "head_guidance.json"
MODEL = "dit:digits"
HELD_OUT = 7
"""Seed of the noise that is judged; the search draws from another."""
STEPS, TRIED, JUDGED, HEADS, CHANNELS = 10, 40, 200, 6, 1
"""Of the objectives: sampler steps, samples that a search and a judgement draw, heads of a layer, channels guided."""
SETTINGS = ((0.25, 3.0), (1.0, 1.0))
"""Strengths and weights of the guidance: the paper's, and PAG's map with the least weight."""


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


def drawn(module: nn.Module, samples: int, seed: int) -> Array:
    """Digits (n, 1, 28, 28) in few steps, without guidance by class: the half that asks for no class is not run."""

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows = len(y) // 2
        with torch.no_grad():
            out: Tensor = module(x=x[:rows], t=t[:rows].float(), y=y[:rows])
        return torch.cat([out, out])

    noise, classes = start(samples, seed)
    parts = zip(noise.split(AT_ONCE), classes.split(AT_ONCE), strict=True)
    walk = partial(Process().sample, denoise, none=-1, steps=STEPS, guidance=1)
    return torch.cat([walk(part, y) for part, y in parts]).numpy()


def ink(pictures: Array) -> float:
    """The mean share of a picture (n, 1, 28, 28) that is ink, 0 to 1."""
    return float((np.clip(pictures, -1, 1) + 1).mean() / 2)


def slant(pictures: Array) -> float:
    """Columns to the right for each row upwards, by the second moments of the ink; the mean over pictures."""
    weight = (np.clip(pictures[:, 0].astype(np.float64), -1, 1) + 1) / 2  # (n, rows, columns)
    weight = weight / weight.sum((1, 2), keepdims=True)
    place = np.arange(28.0)
    up = -(place - (weight.sum(2) @ place)[:, None])  # (n, 28)
    right = place - (weight.sum(1) @ place)[:, None]
    both = np.einsum("nrc,nr,nc->n", weight, up, right)
    return float((both / np.einsum("nrc,nr->n", weight, up**2)).mean())


def objectives(model: Model) -> dict[str, Callable[[Array], float]]:
    """What a search raises, of pictures (n, 1, 28, 28)."""
    task = model.task
    assert isinstance(task, SamplingTask)
    pictures, classes = held_out()
    weight = pictures.mean((1, 2, 3))
    rows = [np.nonzero(classes == digit)[0] for digit in range(10)]
    bold = np.concatenate([own[weight[own].argsort()[-25:]] for own in rows])  # the boldest quarter of each class
    style = read(pictures[bold])[1]
    return {
        "distance_to_real": lambda drawn: -frechet_distance(read(drawn)[1], task.real),
        "ink": ink,
        "slant": slant,
        "distance_to_bold": lambda drawn: -frechet_distance(read(drawn)[1], style),
    }


def perturbed_heads(module: nn.Module) -> str:
    """Which heads of a module are perturbed, in words that tell them from others."""
    found = ((path, part) for path, part in module.named_modules() if isinstance(part, BlendedHeads))
    return "; ".join(f"{path} {(part.columns.argmax(1) // part.head_dim).tolist()}" for path, part in found)


def score_by(objective: Callable[[Array], float], tried: Callable[[nn.Module], Array], name: str) -> Score:
    """An objective of what a module draws, as searches take it."""
    del name
    return lambda module: objective(tried(module))


def guided(model: Model, heads: Mapping[str, tuple[int, ...]], u: float, w: float) -> nn.Module:
    """The model guided away from these heads' perturbation; no heads are all of a layer."""
    step = PerturbHeads(heads=dict(heads), u=u, w=w, guidance=True, channels=CHANNELS)
    return step.apply(share(model.module), Context()).model


def searched(model: Model, context: Context, u: float, w: float) -> dict[str, Any]:
    """For one strength and weight and each objective, the scores of whole layers and of single heads."""
    known: dict[str, Array] = {}

    def tried(module: nn.Module) -> Array:
        key = perturbed_heads(module)
        if key not in known:
            known[key] = drawn(module, TRIED, CALIBRATION_SEED)
        return known[key]

    layers = {path: guided(model, {path: ()}, u, w) for path, _ in layers_of(model.module, HeadedAttention)}
    found: dict[str, Any] = {"u": u, "w": w}
    for name, objective in objectives(model).items():
        scored = replace(context, score_of=partial(score_by, objective, tried))
        step = SelectHeads(score=name, heads_per_round=HEADS, u=u, w=w, channels=CHANNELS, baked=True)
        plan = step.plan(share(model.module), scored)
        found[name] = {
            "layers": {path: float(f"{objective(tried(module)):.6g}") for path, module in layers.items()},
            "heads": {path: list(entry.heads) for path, entry in plan.choice.items()},
            "search": plan.facts.as_json(),
        }
        print(u, w, name, found[name]["layers"], plan.facts.heads, plan.facts.after, flush=True)
    return found


def judged_by(objective: Callable[[Array], float], pictures: Array) -> dict[str, float]:
    """An objective of digits that no search met, and the share of them that are read as asked."""
    right = (read(pictures)[0] == np.arange(len(pictures)) % 10).mean()
    return {"objective": float(f"{objective(pictures):.6g}"), "read_as_asked": round(float(right), 4)}


def best_of(
    model: Model, rows: list[dict[str, Any]], name: str, objective: Callable[[Array], float], plain: Array
) -> dict[str, Any]:
    """What the searches liked best, a layer and heads apart, each at its best strength and weight; judged anew."""

    def anew(row: Mapping[str, Any], heads: Mapping[str, list[int]]) -> dict[str, Any]:
        module = guided(model, {path: tuple(own) for path, own in heads.items()}, row["u"], row["w"])
        figures = judged_by(objective, drawn(module, JUDGED, HELD_OUT))
        return {"u": row["u"], "w": row["w"], "heads": heads, **figures}

    places = [(row, path) for row in rows for path in row[name]["layers"]]
    row, path = max(places, key=lambda place: place[0][name]["layers"][place[1]])
    layer = anew(row, {path: [*range(HEADS)]})
    row = max(rows, key=lambda row: row[name]["search"]["after"])
    heads, without = anew(row, row[name]["heads"]), judged_by(objective, plain)
    gains = [round(each["objective"] - without["objective"], 5) for each in (layer, heads)]
    found = {"plain": without, "layer": layer, "heads": heads, "layer_gains": gains[0], "heads_gain": gains[1]}
    print(name, json.dumps(found), flush=True)
    return found


def by_objectives() -> dict[str, Any]:
    """Searches for each objective, and what they end in on other noise."""
    run = Run(make({"model": MODEL, "steps": [{"pass": "perturb_heads"}]}), Progress(quiet=True))
    context = first_state(run.recipe, run.model, progress=run.progress, trust_code=False).context
    rows = [searched(run.model, context, u, w) for u, w in SETTINGS]
    plain = drawn(run.model.module, JUDGED, HELD_OUT)
    return {
        "sampler_steps": STEPS,
        "samples_of_a_search": TRIED,
        "samples_judged": JUDGED,
        "best": {name: best_of(run.model, rows, name, each, plain) for name, each in objectives(run.model).items()},
        "searches": rows,
    }


def main() -> None:
    """Measure and write down; a part that was not asked for keeps its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="sampling runs that are judged")
    parser.add_argument("--search-samples", type=int, default=20, help="sampling runs for each score of the search")
    parser.add_argument("--candidates", type=int, default=6, help="heads that the search tries")
    parser.add_argument("--part", choices=["pruning", "guidance", "objectives"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {"environment": environment.describe(), "versions": environment.versions()}
    if chosen.part in (None, "pruning"):
        found["pruning_4_of_24_heads"] = pruning()
    if chosen.part in (None, "guidance"):
        found["guidance"] = guidance(chosen.samples, chosen.search_samples, chosen.candidates)
    if chosen.part in (None, "objectives"):
        found["objectives"] = by_objectives()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
