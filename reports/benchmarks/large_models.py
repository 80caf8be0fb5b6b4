"""Graphs of networks larger than memory: peak memory and time of exporting them from disk.

    python -m enginewright.reports.benchmarks.large_models [NAME…]

Writes each network's checkpoint as a sparse file (shapes and zeros, no space on the disk), exports it through the
command line with weights left where they are, has ONNX's checker read the result, and adds the figures to
``reports/results/large_models.json``. Peaks are of the exporting process, its libraries included; Linux starts a
process at its parent's peak, so that a figure may be this script's own and is an upper bound. Of them
``peak_own_bytes``, looked up ten times a second, is memory that cannot be dropped and read from a file again.

Two exports quantize to 8 bits, calibrated on one call. Their weights are random and take their space on the disk,
because zeros have no scale.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from enginewright.ground.errors import require
from enginewright.models.diffusion import dit
from enginewright.sources.filling import without_memory
from enginewright.targets.onnx_files import check_onnx, external_bytes
from enginewright.targets.stored import TYPES

RESULTS = Path(__file__).resolve().parent.parent / "results" / "large_models.json"
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
MODELS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, torch.bfloat16),
    "SDXL UNet": ("UNet2DConditionModel", SDXL, torch.float16),
    "SD3 medium": ("SD3Transformer2DModel", SD3, torch.float16),
    "CogVideoX-2B": ("CogVideoXTransformer3DModel", {}, torch.float16),
}
DIT = "DiT-XL/2"
INT8 = "DiT-XL/2 int8"
FLUX_INT8 = "Flux of 1 B int8"
CALIBRATED = (INT8, FLUX_INT8)
BOUND_BYTES, BOUND_SECONDS = 2e9, 180
DTYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}


def write_sparse(tensors: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> int:
    """A safetensors file of zeros that takes no space; returns the bytes it claims."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        start, end = end, end + math.prod(tensor.shape) * kind.itemsize
        header[name] = {"dtype": DTYPE_NAMES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def write_random(tensors: Mapping[str, Tensor], path: Path) -> int:
    """A safetensors file of random floats, one tensor in memory at a time; returns the bytes of its tensors."""
    end = write_sparse(tensors, torch.float32, path)
    generator = torch.Generator().manual_seed(0)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - end)
        for tensor in tensors.values():
            file.write((0.02 * torch.randn(tensor.shape, generator=generator)).numpy().tobytes())
    return end


def checkpoint(name: str, folder: Path) -> tuple[int, int, list[str]]:
    """Write a network's configuration and weights; parameters, bytes, and what to do with it."""
    if name in (DIT, INT8):
        with without_memory():
            module: Any = dit.build(dit.PUBLISHED["XL/2"])
        file = folder / "weights.safetensors"
        count = sum(p.numel() for p in module.parameters())
        if name == INT8:
            written = write_random(module.state_dict(), file)
            return count, written, quantizing(folder, {"model": "dit:XL/2", "weights": file.name})
        written = write_sparse(module.state_dict(), torch.float32, file)
        return count, written, ["export", "dit:XL/2", "--weights", str(file), "--no-validate"]
    cls, settings, dtype = MODELS["FLUX.1-dev" if name == FLUX_INT8 else name]
    settings = settings | ({"num_layers": 1, "num_single_layers": 4} if name == FLUX_INT8 else {})
    with without_memory():
        module = getattr(require("diffusers", extra="diffusers"), cls)(**settings)
    module.save_config(folder)
    file, count = folder / "diffusion_pytorch_model.safetensors", sum(p.numel() for p in module.parameters())
    if name == FLUX_INT8:
        return count, write_random(module.state_dict(), file), quantizing(folder, {"model": f"diffusers:{folder}"})
    return count, write_sparse(module.state_dict(), dtype, file), ["export", f"diffusers:{folder}", "--no-validate"]


def quantizing(folder: Path, model: dict[str, str]) -> list[str]:
    """Write a recipe that quantizes a model to 8 bits, calibrated on one call; what runs it."""
    recipe = {
        "schema": 1,
        **model,
        "calibration": {"calls": 1},
        "validation": {"skip": True},
        "steps": [{"pass": "quantize_int8"}],
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    return ["run", str(folder / "recipe.toml")]


def watched(command: list[str]) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a command; the largest amount of memory of its own that it was seen to hold, in bytes."""
    peak = 0
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said) as process:
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, 1024 * int(line.split()[1]))
            time.sleep(0.1)
        said.seek(0)
        told = said.read()
    return subprocess.CompletedProcess(command, process.returncode, told), peak


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Export one network and look at what came out."""
    source = folder / "checkpoint"
    source.mkdir()
    parameters, weights, subject = checkpoint(name, source)
    measured = "import resource, sys; from enginewright.cli import main; code = main(sys.argv[1:]); "
    measured += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(code)"
    out = folder / "out"
    start = time.perf_counter()
    run, own = watched([sys.executable, "-c", measured, *subject, "--quiet", "-o", str(out)])
    seconds = time.perf_counter() - start
    if run.returncode:
        sys.exit(f"the export of {name} failed with exit code {run.returncode}")
    graph = check_onnx(out / "model.onnx").graph
    peak = int(run.stdout.splitlines()[-1])
    return {
        "parameters": parameters,
        "weight_bytes": weights,
        "nodes": len(graph.node),
        "bytes_read_in_place": external_bytes(out / "model.onnx", linked=True),
        "peak_bytes": peak,
        "peak_over_weights": round(peak / weights, 3),
        "peak_own_bytes": own,
        "peak_own_over_weights": round(own / weights, 3),
        "seconds": round(seconds, 1),
    } | bounds(name, weights)


def bounds(name: str, weights: int) -> dict[str, float]:
    """What an export may take; those to 8 bits run the network, so that no bound is set for them."""
    if name in CALIBRATED:
        return {}
    return {"bound_bytes": weights / 2 if name == DIT else BOUND_BYTES, "bound_seconds": BOUND_SECONDS}


def main() -> None:
    """Measure the networks that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([DIT, *CALIBRATED, *MODELS])}")
    names = parser.parse_args().names or [DIT, *CALIBRATED, *MODELS]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, Path(folder))
        print(name, json.dumps(found), flush=True)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, name: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
