"""What fewer tokens save: merging in ViT-B/16 timed in ONNX Runtime, and dropping in DeiT-S counted.

    python -m enginewright.reports.benchmarks.tokens [--samples N]

Weights are random: time and multiply-accumulates do not depend on them, fidelity is not measured here. ViT-B/16 has
the defaults of transformers' ``ViTConfig`` (224 pixels, 197 tokens); the merged engine is what TensorRT for RTX builds
too, which is tried. DeiT-S is a ViT of 384, 6 heads, 12 layers. Writes ``reports/results/tokens.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from enginewright.ground.errors import ToolchainError, require
from enginewright.passes.contract import Context, Pass, macs
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.merge_tokens import MergeTokens
from enginewright.passes.tokens.prune_tokens import PruneTokens
from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnxruntime_engine import OnnxRuntime
from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx
from enginewright.validation.latency import summarise, time_interleaved

RESULTS = Path(__file__).resolve().parent.parent / "results" / "tokens.json"
THREADS = 2
MERGED = 16
"""Tokens merged in each block of ViT-B/16."""

KEPT = 0.83
"""Share of its tokens that DeiT-S keeps at each of three borders."""

DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
BOUNDS = {"merged_ratio": 0.55, "dropped_macs": 3.15e9, "dropped_macs_ratio": 0.71}


class Logits(nn.Module):
    """The classifier alone: image (B, 3, 224, 224) -> logits (B, classes)."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        transformers = require("transformers", extra="transformers")
        torch.manual_seed(0)
        self.net = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000, **sizes)).eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Its first output."""
        return self.net(pixel_values=pixel_values).logits


def image(seed: int) -> dict[str, torch.Tensor]:
    """One picture of noise."""
    return {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))}


def shortened(model: nn.Module, step: Pass) -> nn.Module:
    """The model after a pass, the original as it was."""
    calls = [image(seed) for seed in range(1, 5)]
    return step.apply(share(model), Context(example=image(0), calibration=calls, original=model)).model.eval()


def exported(model: nn.Module, folder: Path) -> Path:
    """Its graph, for one picture."""
    folder.mkdir()
    export_onnx(model, image(0), dynamic={}, outputs=["logits"], path=folder / "model.onnx")
    return folder / "model.onnx"


def builds(path: Path, folder: Path) -> str:
    """Whether TensorRT for RTX builds a graph: ``yes``, or why not."""
    folder.mkdir()
    target, shape = TensorRtRtx(), tuple(image(0)["pixel_values"].shape)
    able = target.availability().buildable
    if not able.yes:
        return f"not tried: {able.reason}"
    try:
        target.build(Graph(path=path, ranges={"pixel_values": ShapeRange(shape, shape, shape)}), folder)
    except ToolchainError as error:
        return f"no: {error.message}"
    return "yes"


def merged(folder: Path, samples: int) -> dict[str, Any]:
    """Latency of ViT-B/16 with merging beside the same engine without, one picture at a time."""
    model = Logits()
    models = {"unmerged": model, "onehot": shortened(model, MergeTokens(r=MERGED, restore=False))}
    models["scatter"] = shortened(model, MergeTokens(r=MERGED, restore=False, form="scatter"))
    paths = {name: exported(each, folder / name) for name, each in models.items()}
    runners = {name: OnnxRuntime().open(path, THREADS) for name, path in paths.items()}
    call = {name: tensor.numpy() for name, tensor in image(0).items()}
    with torch.no_grad():
        errors = {
            name: float((torch.from_numpy(runners[name](call)["logits"]) - each(**image(0))).abs().max())
            for name, each in models.items()
        }
    taken = time_interleaved(runners, call, warm_up=3, samples=samples, seed=0)
    found: dict[str, Any] = {"r": MERGED, "threads": THREADS, "batch": 1, "bound_ratio": BOUNDS["merged_ratio"]}
    for name in ("onehot", "scatter"):
        timed = summarise(taken["unmerged"], taken[name], seed=0)
        keys = ("ratio", "ratio_low", "ratio_high", "median_s", "original_median_s", "spread", "warnings")
        found[name] = {key: getattr(timed, key) for key in keys} | {
            "macs": macs(models[name], image(0)),
            "largest_difference_from_pytorch": errors[name],
            "builds_in_tensorrt_rtx": builds(paths[name], folder / f"engine-{name}"),
        }
    return found | {"macs": macs(model, image(0))}


def dropped() -> dict[str, Any]:
    """Multiply-accumulates of DeiT-S with IA-RED2's three borders."""
    model = Logits(**DEIT_S)
    step = PruneTokens(method="policy", keep=KEPT, borders=(0, 4, 8), restore=False)
    before, after = macs(model, image(0)), macs(shortened(model, step), image(0))
    return {
        "keep": KEPT,
        "macs": before,
        "dropped_macs": after,
        "ratio": round(after / before, 4),
        "bound_macs": BOUNDS["dropped_macs"],
        "bound_ratio": BOUNDS["dropped_macs_ratio"],
    }


def main() -> None:
    """Measure both and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=30, help="timed calls of each engine")
    samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as folder:
        found = {"vit_b16_merged": merged(Path(folder), samples), "deit_s_dropped": dropped()}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
