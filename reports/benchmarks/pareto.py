"""What each recipe costs and buys: size, multiply-accumulates, speed and fidelity, side by side.

    python -m enginewright.reports.benchmarks.pareto [MODEL…]

Exports ViT-base (224 x 224) and BERT-base (128 tokens), both with random weights, and the trained ``dit:digits`` with
each recipe for ONNX Runtime through the command line, and writes ``reports/results/pareto.json`` and ``pareto.md``.
A row that no other of its model beats in both time and fidelity is marked. Of random weights, fidelity shows what the
arithmetic loses and not what a task would: pruning looks worse than it is on trained weights. Nothing was recovered.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from enginewright import environment

FOLDER = Path(__file__).resolve().parent.parent / "results"
RESULTS, TABLE = FOLDER / "pareto.json", FOLDER / "pareto.md"

AXFORMER = "approximate_by_accuracy:score=reports/benchmarks/keep_forty_percent.py:score"
COMMON: dict[str, list[str]] = {
    "fp32": [],
    "int8": ["quantize_int8"],
    "mixed precision": ["search_precision:max_error=0.015"],
    "4-bit weights": ["quantize_weights"],
    "heads -25 %": ["prune_heads:share=0.25"],
    "width -25 %": ["prune_width:share=0.25"],
    "depth -25 %": ["prune_depth:share=0.25"],
    "low rank": ["factorize"],
    "width -25 %, int8": ["prune_width:share=0.25", "quantize_int8"],
    "heads and width -25 %, int8": ["prune_heads:share=0.25", "prune_width:share=0.25", "quantize_int8"],
}
RECIPES: dict[str, dict[str, list[str]]] = {
    "ViT-base": {
        **COMMON,
        "tokens merged, r = 8": ["merge_tokens:r=8"],
        "tokens merged, r = 8, int8": ["merge_tokens:r=8", "quantize_int8"],
        "tokens merged, r = 16": ["merge_tokens:r=16"],
    },
    "BERT-base": {
        **COMMON,
        "AxFormer to 40 %": [AXFORMER],
        "AxFormer to 40 %, int8": [AXFORMER, "quantize_int8"],
    },
    "dit:digits": {
        **COMMON,
        "8-bit floats": ["quantize_fp8"],
        "experts, 2 of 12": ["dense_to_moe"],
    },
}


def checkpoint(name: str, folder: Path) -> str:
    """A model string; networks with random weights are written first, biases and norms moved off their start."""
    if name == "dit:digits":
        return name
    from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    vit = name == "ViT-base"
    model: Any = ViTForImageClassification(ViTConfig()) if vit else BertModel(BertConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    return f"hf:{folder}"


def measured(model: str, steps: list[str], folder: Path) -> dict[str, Any]:
    """Export with one recipe and pick what the table shows; or the error that it ended in."""
    command = [sys.executable, "-m", "enginewright", "export", model, "--target", "onnxruntime", "--quiet", "--json"]
    options = [word for step in steps for word in ("--pass", step)]
    run = subprocess.run([*command, *options, "-o", str(folder)], capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1):
        return {"steps": steps, "failed": run.stderr.strip().splitlines()[:2]}
    report = json.loads(run.stdout)
    [target] = report["targets"]
    last = report["steps"][-1] if report["steps"] else None
    timed, worst = target["latency"], max(target["fidelity"], key=lambda output: output["relative_l2"])
    found = {
        "steps": steps,
        "changed": sum(len(step["changed"]) for step in report["steps"]),
        "megabytes": round(target["bytes"] / 1e6, 2),
        "macs": last["macs"]["after"] if last else report["model"]["macs"],
        "ratio": [round(timed[key], 3) for key in ("ratio", "ratio_low", "ratio_high")],
        "relative_l2": float(f"{worst['relative_l2']:.3g}"),
        "cosine": float(f"{worst['cosine']:.6g}"),
        "notes": target["notes"],
    }
    quality = {figure["name"]: figure["value"] for figure in target["quality"]}
    return found | ({"judged_as_asked": quality["judged_as_asked"]} if "judged_as_asked" in quality else {})


def unbeaten(rows: dict[str, dict[str, Any]]) -> set[str]:
    """Recipes that no other beats in both time and error."""
    fit = {name: row for name, row in rows.items() if "failed" not in row}

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return a["ratio"][0] < b["ratio"][0] and a["relative_l2"] < b["relative_l2"]

    return {name for name, row in fit.items() if not any(beats(other, row) for other in fit.values())}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    parts = ["# What each recipe costs and buys\n", " ".join((__doc__ or "").split("\n\n")[2].split()) + "\n"]
    for model, about in found.items():
        rows, machine = about["rows"], about["environment"]
        best = unbeaten(rows)
        where = f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instructions'])}"
        parts.append(f"## {model}\n\nOn {where}.\n")
        parts.append("| | Recipe | MB | GMACs | Time, PyTorch = 1 | Relative L2 | Cosine | Judged |")
        parts.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, row in rows.items():
            if "failed" in row:
                parts.append(f"| | {name} | not measured: {' '.join(row['failed'])} | | | | | |")
                continue
            ratio, low, high = row["ratio"]
            macs = f"{row['macs'] / 1e9:.3g}" if row["macs"] else "not counted"
            judged = f"{row['judged_as_asked']:.1%}" if "judged_as_asked" in row else ""
            cells = (
                row["megabytes"],
                macs,
                f"{ratio:.2f} ({low:.2f} to {high:.2f})",
                row["relative_l2"],
                row["cosine"],
            )
            parts.append(f"| {'best' if name in best else ''} | {name} | {' | '.join(map(str, cells))} | {judged} |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Measure the models that were named, or all; one row at a time, so that an interrupted run keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(RECIPES)}")
    chosen = parser.parse_args().models or list(RECIPES)
    for name in chosen:
        with tempfile.TemporaryDirectory() as temporary:
            model = checkpoint(name, Path(temporary) / "model")
            for number, (recipe, steps) in enumerate(RECIPES[name].items()):
                row = measured(model, steps, Path(temporary) / str(number))
                print(name, recipe, json.dumps(row), flush=True)
                known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                about = known.setdefault(name, {"rows": {}})
                about |= {"environment": environment.describe(), "versions": environment.versions()}
                about["rows"][recipe] = row
                RESULTS.write_text(json.dumps(known, indent=2) + "\n")
                TABLE.write_text(table(known))


if __name__ == "__main__":
    main()
