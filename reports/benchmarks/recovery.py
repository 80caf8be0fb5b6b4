"""What distillation gives back to ``dit:digits`` when half and when a quarter of its feed-forward units went.

    python -m enginewright.reports.benchmarks.recovery [--part recovered|experts|fewer|aligned|shallower]

Writes ``reports/results/recovery.json``. ``recovered``: samples are drawn and judged before pruning, after it and
after recovery. ``experts``: half of the feed-forward's units active, once by experts and once by removing the others,
each recovered alike, three seeds. ``fewer``: the same with 37.5 % and with a quarter of them active, and experts of
units that answer the same tokens. ``aligned``: the error that is left after so many steps, with and without features
and attention maps, and with an alignment that stops half-way or by HASTE's trigger (arXiv:2505.16792), three seeds.
``shallower``: the same for a student of two blocks of four, and longer. Errors are relative L2 errors of outputs on
calls that neither calibration nor training met. Takes about two CPU-hours.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from enginewright import environment
from enginewright.calibration import VALIDATION_SEED, tensors
from enginewright.ground.signature import Array
from enginewright.passes.contract import Context, Inputs, Pass, cost
from enginewright.passes.kernel.surgery import share
from enginewright.passes.moe.dense_to_moe import DenseToMoe
from enginewright.passes.pruning.prune_depth import PruneDepth
from enginewright.passes.pruning.prune_width import PruneWidth
from enginewright.passes.recovery.distill import Distill
from enginewright.passes.traits import FeedForward, layers_of
from enginewright.pipeline import Run
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports.benchmarks.head_guidance import STEPS, drawn
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
LONG = (200,)
STOPPING: dict[str, dict[str, Any]] = {
    "output only": {},
    "aligned to the end": {"features": 1.0, "attention": 1.0},
    "aligned until gradients agree less than 0.1": {
        "features": 1.0,
        "attention": 1.0,
        "stop": "angle",
        "stop_cosine": 0.1,
    },
}
HALF: dict[str, Pass] = {
    "experts": DenseToMoe(shared=0.25, experts=12, top_k=4, form="nonzero"),
    "experts, gates of one": DenseToMoe(shared=0.25, experts=12, top_k=4, form="nonzero", gate="one"),
    "width": PruneWidth(share=0.5, importance="taylor"),
}
"""Half of the feed-forward's hidden units active: 0.25 + 0.75 * 4 / 12 by experts."""

TOGETHER: dict[str, Any] = {"grouping": "clustered", "router": "fitted", "gate": "one", "form": "nonzero"}
FEWER: dict[str, Pass] = {
    "0.375 width": PruneWidth(share=0.625, importance="taylor"),
    "0.375 experts, 2 of 12": DenseToMoe(shared=0.25, experts=12, top_k=2, **TOGETHER),
    "0.375 experts, 8 of 48": DenseToMoe(shared=0.25, experts=48, top_k=8, **TOGETHER),
    "0.25 width": PruneWidth(share=0.75, importance="taylor"),
    "0.25 experts, 8 of 56": DenseToMoe(shared=0.125, experts=56, top_k=8, **TOGETHER),
}
"""Shares of the hidden units that are active: 0.25 + 0.75 * 2 / 12 or 8 / 48, and 0.125 + 0.875 * 8 / 56."""
UNBALANCED = RECOVERY | {"balance": 0.0}


def prepared(seed: int) -> tuple[Run, Context, list[Inputs]]:
    """``dit:digits``, what its passes may look at, and calls that neither calibration nor training met."""
    recipe = {"model": "dit:digits", "seed": seed, "steps": [{"pass": "distill"}], "validation": {"threads": 1}}
    run = Run(make(recipe), Progress(quiet=True))
    context = first_state(run.recipe, run.model, progress=run.progress, trust_code=False).context
    assert context.draw is not None
    context = replace(context, draw=functools.cache(context.draw))  # several runs are taught by the same calls
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
    assert run.model.task is not None
    seed = run.recipe.head.seed + VALIDATION_SEED
    runner = EagerRunner(module, threads=run.threads, outputs=run.model.outputs)
    return read_by_judge(run, run.model.task.sample(runner, SAMPLES, seed))


def judged_in_few_steps(run: Run, module: nn.Module) -> dict[str, float]:
    """The same of runs in few steps and without guidance by class, from one noise: a fifth of the work and less."""
    return read_by_judge(run, drawn(module, SAMPLES, VALIDATION_SEED))


def read_by_judge(run: Run, pictures: Array) -> dict[str, float]:
    """Pictures (n, 1, 28, 28) as the judge sees them."""
    task, metrics = run.model.task, load_metrics()
    assert task is not None
    seen = task.drawn(pictures)
    names = ("judged_as_asked", "frechet_ratio")
    return {name: round(metrics[name].measure(task, seen, seen), 4) for name in names}  # type: ignore[attr-defined]


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


def by_experts(
    steps: Mapping[str, Pass],
    recovery: Mapping[str, Any],
    judge: Callable[[Run, nn.Module], dict[str, float]],
    rows: list[dict[str, Any]],
    seeds: Sequence[int],
    put: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Experts and narrower layers at the same active units: as they were made, and recovered alike.

    Args:
        steps: what makes them.
        recovery: parameters of ``distill``.
        judge: looks at samples.
        rows: of seeds that are not measured again.
        seeds: that are.
        put: called with all rows whenever there is another.
    """
    rows = [row for row in rows if row["seed"] not in seeds]
    for seed in seeds:
        run, context, calls = prepared(seed)
        for name, step in steps.items():
            student = step.apply(share(run.model.module), context).model
            began = time.process_time()
            result = Distill(**recovery).apply(share(student), context)
            minutes = (time.process_time() - began) / 60
            row = {
                "what": name,
                "seed": seed,
                "settings": step.model_dump(mode="json"),
                "macs": result.after.macs,
                "parameters": result.after.parameter_count,
                "made": {**judge(run, student), "relative_l2": error(run, student, calls)},
                "recovered": {**judge(run, result.model), "relative_l2": error(run, result.model, calls)},
                "cpu_minutes": round(minutes, 2),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
            put(rows)


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By what was recovered, the middle of the seeds of each figure."""
    found: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        found.setdefault(row["what"], []).append(row["recovered"])
    return {
        what: {figure: round(statistics.median(each[figure] for each in figures), 4) for figure in figures[0]}
        for what, figures in found.items()
    }


def aligned(
    students: Callable[[Run, Context], nn.Module],
    budgets: Sequence[int],
    losses: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Any],
    seeds: Sequence[int],
    put: Callable[[dict[str, Any]], None],
) -> None:
    """Errors after each budget, by what is aligned; each budget is a run of its own with its own schedule."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in losses}
    stopped: dict[str, dict[int, list[int | None]]] = {name: {} for name in losses}
    before: list[float] = []
    for seed in seeds:
        run, context, calls = prepared(seed)
        student = students(run, context)
        before.append(error(run, student, calls))
        for budget, (name, own) in itertools.product(budgets, losses.items()):
            result = Distill(steps=budget, **SMALL, **own).apply(share(student), context)
            found[name].setdefault(budget, []).append(error(run, result.model, calls))
            stopped[name].setdefault(budget, []).append(result.plan.facts.alignment_stopped_at)
            print(seed, budget, name, found[name][budget][-1], stopped[name][budget][-1], flush=True)
        put(
            {
                **about,
                "settings": SMALL,
                "losses": losses,
                "seeds": list(seeds[: len(before)]),
                "relative_l2_before": before,
                "relative_l2_by_steps": found,
                "stopped_at": stopped,
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
    parser.add_argument("--part", choices=["recovered", "experts", "fewer", "aligned", "shallower"])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="experts and fewer keep the others' rows")
    chosen = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    write({"environment": environment.describe(), "versions": environment.versions()})
    if chosen.part in (None, "recovered"):
        run, _, _ = prepared(seed=0)
        original = judged(run, run.model.module)
        done = []
        for share_removed in (0.5, 0.25):
            done.append(recovered(share_removed, original))
            write({"recovered": done})
    if chosen.part in (None, "experts"):
        by_experts(
            HALF, RECOVERY, judged, known.get("experts", []), chosen.seeds, lambda rows: write({"experts": rows})
        )
    if chosen.part in (None, "fewer"):
        about = {"recovery": UNBALANCED, "sampler_steps": STEPS, "samples": SAMPLES}
        by_experts(
            FEWER,
            UNBALANCED,
            judged_in_few_steps,
            known.get("fewer", {}).get("rows", []),
            chosen.seeds,
            lambda rows: write({"fewer": {**about, "median": medians(rows), "rows": rows}}),
        )
    if chosen.part in (None, "aligned"):
        half = {"share_of_hidden_units_removed": 0.5}
        aligned(
            lambda run, _: pruned(run.model.module, 0.5),
            BUDGETS,
            ALIGNED,
            half,
            chosen.seeds,
            lambda found: write({"aligned": found}),
        )
    if chosen.part in (None, "shallower"):
        aligned(
            lambda run, context: PruneDepth(count=2).apply(share(run.model.module), context).model,
            LONG,
            STOPPING,
            {"blocks_removed": 2, "of": 4},
            chosen.seeds,
            lambda found: write({"shallower": found}),
        )
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
