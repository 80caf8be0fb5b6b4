"""What routed experts save: a feed-forward as it is beside its mixture of experts, in ONNX Runtime.

    python -m enginewright.reports.benchmarks.experts [--threads 2] [--samples 60] [--tokens 256 1024]

One GELU feed-forward of 768 -> 3072 -> 768, as in DiT-B, ViT-B and BERT-base, cut by ``dense_to_moe`` into a shared
expert and 12 others of which a token uses 2: 37.5 % of its weights are active. Random weights and tokens; the router's
loads are even on the calibration tokens. Writes ``reports/results/experts.json``: ratios taken in turns, with a 95 %
interval, of latencies on ``--threads`` and of processor time on one, how far each form is from the masked one, and
whether TensorRT for RTX builds it. Latencies want a machine that does nothing else: a short product on two threads
waits for the slower of them. Processor times hold beside other work, but for the caches. What keeps the batched form
from its share of multiply-accumulates on a CPU: ONNX Runtime packs constant matrices of two dimensions once, and the
batched product's of three in every call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enginewright import environment
from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.models.blocks.transformer import Mlp
from enginewright.passes.contract import Context, Plan, macs
from enginewright.passes.moe.dense_to_moe import DenseToMoe
from enginewright.passes.moe.experts import Products
from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnxruntime_engine import OnnxRuntime
from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx
from enginewright.validation.latency import BLOCK, summarise, time_interleaved

RESULTS = Path(__file__).resolve().parent.parent / "results" / "experts.json"
WIDTH, HIDDEN, CALLS = 768, 3072, 8
BOUND = 0.45
DROPS = (0.0, 0.02)
PRODUCTS: tuple[Products, ...] = ("batched", "separate")


class Block(nn.Module):
    """A model that is one feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp: nn.Module = Mlp(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        return self.mlp(x)


def built(plan: Plan | None = None, step: DenseToMoe | None = None) -> nn.Module:
    """The dense model, or one rewritten; always around the same weights."""
    torch.manual_seed(0)
    model: nn.Module = Block().eval()
    return step.rewrite(model, plan) if plan and step else model


def write(model: nn.Module, tokens: int, folder: Path) -> Path:
    """Its ONNX file, with a dynamic batch."""
    folder.mkdir()
    example = {"x": torch.randn(2, tokens, WIDTH)}
    dynamic = {"x": {0: ("batch", 1, 8)}}
    export_onnx(model, example, dynamic=dynamic, outputs=["y"], path=folder / "model.onnx")
    return folder / "model.onnx"


def rtx(path: Path, tokens: int) -> str:
    """Whether TensorRT for RTX builds an ONNX file; ``builds``, or why not."""
    target = TensorRtRtx()
    if reason := target.availability().why_not("buildable"):
        return f"not measured: {reason}"
    shapes = ShapeRange((1, tokens, WIDTH), (1, tokens, WIDTH), (8, tokens, WIDTH))
    try:
        target.build(Graph(path=path, ranges={"x": shapes}), path.parent)
    except ToolchainError as error:
        return error.message
    return "builds"


def cpu_seconds(runners: Mapping[str, Runner], inputs: Arrays, samples: int) -> dict[str, list[float]]:
    """Processor time of calls of one-threaded runners, taken in turns: what else runs here counts little."""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(samples // BLOCK):
        for name, runner in runners.items():
            runner(inputs)
            for _ in range(BLOCK):
                start = time.thread_time()
                runner(inputs)
                taken[name].append(time.thread_time() - start)
    return taken


def ratios(times: Mapping[str, list[float]], name: str) -> dict[str, Any]:
    """A form's times over the dense layer's."""
    summary = summarise(times["dense"], times[name], seed=0)
    return {
        "ratio": round(summary.ratio, 3),
        "ratio_low": round(summary.ratio_low, 3),
        "ratio_high": round(summary.ratio_high, 3),
        "dense_median_s": round(summary.original_median_s, 6),
        "met": summary.ratio <= BOUND,
        "warnings": summary.warnings,
    }


def variants(plans: Mapping[float, Plan]) -> dict[str, tuple[nn.Module, Plan]]:
    """Every form, with the plan that it was made by."""
    found = {"nonzero": (built(plans[0.0], DenseToMoe(form="nonzero")), plans[0.0])}
    for drop, plan in plans.items():
        for products in PRODUCTS:
            name = f"capacity, {products}, drop {drop}"
            found[name] = (built(plan, DenseToMoe(form="capacity", products=products)), plan)
    return found


def compare(tokens: int, threads: int, samples: int, folder: Path) -> dict[str, Any]:
    """Dense and every form on samples of so many tokens."""
    generator = torch.Generator().manual_seed(1)
    calls = [{"x": torch.randn(1, tokens, WIDTH, generator=generator)} for _ in range(CALLS)]
    context = Context(calibration=calls)
    made = variants({drop: DenseToMoe(gate="one", drop=drop).plan(built(), context) for drop in DROPS})
    models = {"dense": built(), **{name: model for name, (model, _) in made.items()}}
    paths = {name: write(model, tokens, folder / f"{number}") for number, (name, model) in enumerate(models.items())}
    inputs: Arrays = {"x": calls[0]["x"].numpy()}

    def opened(threads: int) -> dict[str, Runner]:
        return {name: OnnxRuntime().open(path, threads) for name, path in paths.items()}

    runners = opened(threads)
    wall = time_interleaved(runners, inputs, warm_up=5, samples=samples, seed=0, block=BLOCK)
    cpu = cpu_seconds(opened(1), inputs, samples)
    found: dict[str, Any] = {}
    for name, (model, plan) in made.items():
        [facts], [dealt] = plan.facts.layers.values(), plan.choice.values()
        with torch.no_grad():
            masked = built(plan, DenseToMoe(form="masked"))(calls[0]["x"]).numpy()
        found[name] = {
            "latency": ratios(wall, name),
            "cpu_time_on_one_thread": ratios(cpu, name),
            "macs_ratio": round(macs(model, calls[0]) / macs(models["dense"], calls[0]), 4),
            "largest_distance_from_masked": float(np.abs(runners[name](inputs)["y"] - masked).max()),
            "tensorrt_rtx": rtx(paths[name], tokens),
        }
        if name != "nonzero":
            found[name] |= {"capacity": dealt.capacity, "overflow": facts["overflow"]}
    return found


def main() -> None:
    """Measure and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    chosen = parser.parse_args()
    found: dict[str, Any] = {
        "environment": environment.describe(),
        "versions": environment.versions(),
        "threads": chosen.threads,
        "samples": chosen.samples,
        "bound_ratio": BOUND,
        "active_share": 0.375,
    }
    for tokens in chosen.tokens:
        with tempfile.TemporaryDirectory() as folder:
            found[f"{tokens} tokens"] = compare(tokens, chosen.threads, chosen.samples, Path(folder))
    found["environment_after"] = {"load": environment.describe()["load"]}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
