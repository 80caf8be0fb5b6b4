"""What distillation gives back to ``dit:digits`` when half and when a quarter of its feed-forward units went.

    python -m enginewright.reports.benchmarks.recovery [--part recovered|experts|aligned]

Writes ``reports/results/recovery.json``. ``recovered``: samples are drawn and judged before pruning, after it and
after recovery. ``experts``: half of the feed-forward's units active, once by experts and once by removing the others,
each recovered alike, three seeds. ``aligned``: the error that is left after so many steps, with and without features
and attention maps, and with an alignment that stops half-way or by HASTE's trigger (arXiv:2505.16792), three seeds.
Errors are relative L2 errors of outputs on calls that neither calibration nor training met. Takes about half a
CPU-hour.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from enginewright import environment
from enginewright.calibration import VALIDATION_SEED, tensors
from enginewright.passes.contract import Context, Inputs, Pass, cost
from enginewright.passes.kernel.surgery import share
from enginewright.passes.moe.dense_to_moe import DenseToMoe
from enginewright.passes.pruning.prune_width import PruneWidth
from enginewright.passes.recovery.distill import Distill
from enginewright.passes.traits import FeedForward, layers_of
from enginewright.pipeline import Run
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.state import first_state
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.validation.metrics import load_metrics

RESULTS = Path(__file__).resolve().parent.parent / "results" / "recovery.json"
SAMPLES = 200
SEEDS, BUDGETS = (0, 1, 2), (25, 35, 50)
RECOVERY: dict[str, Any] = {"steps": 80, "batch": 8, "lr": 1e-3}
SMALL: dict[str, Any] = {"batch": 4, "lr": 1e-3}
ALIGNED: dict[str, dict[str, Any]] = {
    "output only": {},
    "aligned to the end": {"features": 1.0, "attention": 1.0},
    "aligned for half": {"features": 1.0, "attention": 1.0, "stop": "share", "stop_share": 0.5},
    "aligned until gradients part": {"features": 1.0, "attention": 1.0, "stop": "angle"},
}
HALF: dict[str, Pass] = {
    "experts": DenseToMoe(shared=0.25, experts=12, top_k=4, form="nonzero"),
    "experts, gates of one": DenseToMoe(shared=0.25, experts=12, top_k=4, form="nonzero", gate="one"),
    "width": PruneWidth(share=0.5, importance="taylor"),
}
"""Half of the feed-forward's hidden units active: 0.25 + 0.75 * 4 / 12 by experts."""


def prepared(seed: int) -> tuple[Run, Context, list[Inputs]]:
    """``dit:digits``, what its passes may look at, and calls that neither calibration nor training met."""
    run = Run(make({"model": "dit:digits", "seed": seed, "steps": [{"pass": "distill"}]}), Progress(quiet=True))
    context = first_state(run.recipe, run.model, progress=run.progress, trust_code=False).context
    return run, context, tensors(run.model.batches(32, seed + VALIDATION_SEED))


def pruned(module: nn.Module, share_removed: float) -> nn.Module:
    """A copy without the hidden units whose weights are smallest: product of the norms on their way in and out."""
    module = share(module)
    for _, layer in list(layers_of(module, FeedForward)):
        came_in = layer.inputs[0].weight.detach().norm(dim=1)
        going_out = layer.output.weight.detach().norm(dim=0)
        count = layer.hidden - round(share_removed * layer.hidden)
        layer.keep_hidden(sorted((came_in * going_out).topk(count).indices.tolist()))
    return module


def error(run: Run, module: nn.Module, calls: list[Inputs]) -> float:
    """Mean relative L2 error of the outputs on these calls."""
    with torch.no_grad():
        pairs = [(module(**call), run.model.module(**call)) for call in calls]
    return round(statistics.mean(float((got - exact).norm() / exact.norm()) for got, exact in pairs), 4)


def judged(run: Run, module: nn.Module) -> dict[str, float]:
    """Samples of whole runs, from validation's noise, as the judge sees them."""
    task = run.model.task
    assert task is not None
    seed = run.recipe.head.seed + VALIDATION_SEED
    runner = EagerRunner(module, threads=run.threads, outputs=run.model.outputs)
    drawn = task.drawn(task.sample(runner, SAMPLES, seed))
    metrics = load_metrics()
    names = ("judged_as_asked", "frechet_ratio")
    return {name: round(metrics[name].measure(task, drawn, drawn), 4) for name in names}  # type: ignore[attr-defined]


def recovered(share_removed: float, original: dict[str, float]) -> dict[str, Any]:
    """Samples of the original, of the pruned model and of the recovered one."""
    run, context, calls = prepared(seed=0)
    student = pruned(run.model.module, share_removed)
    step = Distill(**RECOVERY)
    began, cpu = time.perf_counter(), time.process_time()
    result = step.apply(share(student), context)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {
        "share_of_hidden_units_removed": share_removed,
        "parameters": sum(p.numel() for p in run.model.module.parameters()),
        "parameters_after": result.after.parameter_count,
        "macs": cost(run.model.module, context.example).macs,
        "macs_after": result.after.macs,
        "settings": RECOVERY,
        "samples": SAMPLES,
        "original": original,
        "pruned": {**judged(run, student), "relative_l2": error(run, student, calls)},
        "recovered": {**judged(run, result.model), "relative_l2": error(run, result.model, calls)},
        "cpu_minutes": round(cpu_seconds / 60, 2),
        "wall_minutes": round(seconds / 60, 2),
        "threads": torch.get_num_threads(),
    }


def halved(put: Callable[[list[dict[str, Any]]], None]) -> None:
    """Experts and narrower layers at the same active units: as they were made, and recovered alike."""
    rows: list[dict[str, Any]] = []
    for seed, (name, step) in itertools.product(SEEDS, HALF.items()):
        run, context, calls = prepared(seed)
        student = step.apply(share(run.model.module), context).model
        began = time.process_time()
        result = Distill(**RECOVERY).apply(share(student), context)
        minutes = (time.process_time() - began) / 60
        row = {
            "what": name,
            "seed": seed,
            "settings": step.model_dump(mode="json"),
            "macs": result.after.macs,
            "parameters": result.after.parameter_count,
            "made": {**judged(run, student), "relative_l2": error(run, student, calls)},
            "recovered": {**judged(run, result.model), "relative_l2": error(run, result.model, calls)},
            "cpu_minutes": round(minutes, 2),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
        put(rows)


def aligned(share_removed: float, put: Callable[[dict[str, Any]], None]) -> None:
    """Errors after each budget, by what is aligned; each budget is a run of its own with its own schedule."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in ALIGNED}
    before: list[float] = []
    for seed in SEEDS:
        run, context, calls = prepared(seed)
        student = pruned(run.model.module, share_removed)
        before.append(error(run, student, calls))
        for budget, (name, losses) in itertools.product(BUDGETS, ALIGNED.items()):
            result = Distill(steps=budget, **SMALL, **losses).apply(share(student), context)
            found[name].setdefault(budget, []).append(error(run, result.model, calls))
            print(seed, budget, name, found[name][budget][-1], flush=True)
        put(
            {
                "share_of_hidden_units_removed": share_removed,
                "settings": SMALL,
                "losses": ALIGNED,
                "seeds": list(SEEDS[: len(before)]),
                "relative_l2_before": before,
                "relative_l2_by_steps": found,
                "median_by_steps": {n: {b: statistics.median(e) for b, e in by.items()} for n, by in found.items()},
            }
        )


def write(new: dict[str, Any]) -> None:
    """Put figures into the file; what is not measured anew stays."""
    found = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), **new}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Measure and write down; a part that was not asked for keeps its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["recovered", "experts", "aligned"])
    chosen = parser.parse_args()
    write({"environment": environment.describe(), "versions": environment.versions()})
    if chosen.part in (None, "recovered"):
        run, _, _ = prepared(seed=0)
        original = judged(run, run.model.module)
        done = []
        for share_removed in (0.5, 0.25):
            done.append(recovered(share_removed, original))
            write({"recovered": done})
    if chosen.part in (None, "experts"):
        halved(lambda rows: write({"experts": rows}))
    if chosen.part in (None, "aligned"):
        aligned(0.5, lambda figures: write({"aligned": figures}))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
