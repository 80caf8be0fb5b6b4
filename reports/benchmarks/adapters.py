"""What a LoRA costs in an engine: merged into the weights, beside them with its strength as an input, or as inputs.

    python -m enginewright.reports.benchmarks.adapters [--model dit:digits] [--ranks 4 16 64] [--samples 60]

Writes ``reports/results/adapters.json``: for each rank the multiply-accumulates, bytes and time of ONNX Runtime engines
on one thread, beside an engine without adapters, in turns. The adapter is random and for every linear layer of the
blocks; what all forms answer is compared with the merged one. Times count what a caller pays: the matrices are handed
over with every call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from enginewright import environment, pipeline, sources
from enginewright.adapters import adapter_inputs
from enginewright.ground.distance import relative_l2
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.opened import open_subject
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.sources.contract import Model
from enginewright.validation import latency
from enginewright.validation.inputs import draw

RESULTS = Path(__file__).resolve().parent.parent / "results" / "adapters.json"
THREADS = 1
FILE = "adapter.safetensors"
FORMS: dict[str, list[dict[str, Any]]] = {
    "base": [],
    "fused": [{"pass": "fold_adapters", "file": FILE}],
    "strength as input": [{"pass": "adapters_as_inputs", "files": [FILE], "inputs": "strength"}],
    "matrices as inputs": [{"pass": "adapters_as_inputs", "files": [FILE]}],
}
"""Steps by form; ``strength as input`` is the side path with its matrices inside."""


def write_adapter(model: Model, rank: int, path: Path) -> int:
    """A random adapter for every linear layer of the blocks; how many there are."""
    noise = torch.Generator().manual_seed(0)
    layers = [
        (name, layer)
        for name, layer in model.module.named_modules()
        if name.startswith("blocks.") and isinstance(layer, nn.Linear)
    ]
    tensors = {}
    for name, layer in layers:
        scale = 0.3 * (rank * layer.in_features) ** -0.5
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, layer.in_features, generator=noise)
        tensors[f"{name}.lora_up.weight"] = scale * torch.randn(layer.out_features, rank, generator=noise)
    save_file(tensors, path)
    return len(layers)


def exported(model: str, form: str, folder: Path) -> tuple[Runner, dict[str, Any]]:
    """The engine of one form with the adapter in it or given to it, and what its report says of the cost."""
    recipe = make(
        {
            "model": model,
            "steps": FORMS[form],
            "targets": [{"target": "onnxruntime"}],
            "validation": {"skip": True, "threads": THREADS},
        },
        folder=folder,
    )
    out = folder / form.replace(" ", "-")
    report, _ = pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    runner = open_subject(str(out), threads=THREADS).runners["onnxruntime"]
    if form == "matrices as inputs":
        runner = partial(with_inputs, runner, adapter_inputs(out, folder / FILE))
    step = report.steps[0] if report.steps else None
    return runner, {
        "macs": step.macs.after if step else report.model.macs,
        "parameters": step.parameter_count.after if step else report.model.parameter_count,
        "engine_bytes": report.targets[0].bytes,
        "words": step.notes if step else [],
    }


def with_inputs(runner: Runner, more: Arrays, inputs: Arrays) -> Arrays:
    """A call with the matrices of an adapter."""
    return runner({**inputs, **more})


def measured(model: str, rank: int, samples: int) -> dict[str, Any]:
    """All forms of one rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = sources.load(model)
        layers = write_adapter(known, rank, folder / FILE)
        engines = {form: exported(model, form, folder) for form in FORMS}
        runners = {form: runner for form, (runner, _) in engines.items()}
        call = draw(known.inputs, seed=1, sizes={"batch": 1})
        answers = {form: next(iter(runner(call).values())) for form, runner in runners.items()}
        taken = latency.time_in_turns(runners, call, warm_up=5, samples=samples, seed=0)
    found: dict[str, Any] = {"layers": layers}
    for form, (_, figures) in engines.items():
        timed = latency.summarise(taken["base"], taken[form], seed=0)
        keys = ("median_s", "ratio", "ratio_low", "ratio_high", "spread", "unsafe", "warnings")
        found[form] = figures | {
            **{key: getattr(timed, key) for key in keys},
            "relative_l2_to_fused": relative_l2(answers["fused"], answers[form]),
        }
    return found


def main() -> None:
    """Measure every rank and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit:digits", help="a DiT of the catalogue, such as dit:B/2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="of the adapter")
    parser.add_argument("--samples", type=int, default=60, help="timed calls of each engine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write")
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    found = {
        "environment": environment.describe(),
        "versions": environment.versions(),
        "model": chosen.model,
        "threads": THREADS,
        "ranks": {str(rank): measured(chosen.model, rank, chosen.samples) for rank in chosen.ranks},
    }
    chosen.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
