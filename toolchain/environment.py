"""The machine and the libraries that a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from enginewright.targets import machine

LIBRARIES = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
    "numpy",
    "polygraphy",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "diffusers",
    "transformers",
)


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system; nothing that names this machine or its user."""
    flags = machine.cpu_flags()
    gpu = machine.gpu()
    return {
        "cpu": machine.cpu_model(),
        "cpu_id": machine.cpu_id(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}),
        "int8_saturates": machine.int8_saturates(),
        "gpu": machine.gpu_name() if gpu.yes else f"none: {gpu.reason}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Ours and every library's that is installed."""
    found = {}
    for name in ("enginewright", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def problems() -> list[str]:
    """What is wrong with the installation, and what to do; empty when nothing is."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if name in versions()]
    if len(both) < 2:
        return []
    return [
        "onnxruntime and onnxruntime-gpu are both installed and put their files into the same folder, so that either "
        "may be broken; keep one: pip uninstall onnxruntime onnxruntime-gpu, then "
        "pip install 'enginewright[cpu]' or 'enginewright[gpu]'"
    ]
