"""What several tests share: a small artifact, exported once, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _draw_the_same_numbers() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, whichever tests its worker ran before it."""
    _draw_the_same_numbers()


def pytest_collectstart() -> None:
    """So does every test file, whichever files were collected before it."""
    _draw_the_same_numbers()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dit:tiny`` in 8 bits for ONNX Runtime, with TensorRT as an optional target. Read only."""
    from enginewright import pipeline
    from enginewright.progress import Progress
    from enginewright.recipe import make

    out = tmp_path_factory.mktemp("artifact") / "out"
    recipe = make(
        {
            "model": "dit:tiny",
            "gates": ["fidelity.cosine >= 0.9", "fidelity.relative_l2 <= 0.5"],
            "steps": [{"pass": "quantize_int8"}],
            "targets": [{"target": "onnxruntime"}, {"target": "tensorrt", "optional": True}],
            "validation": {"rounds": 4, "calls": 2},
        }
    )
    pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    return out


@pytest.fixture
def enginewright(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in an empty folder."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "enginewright", *map(str, arguments)],
            cwd=tmp_path,
            env={"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
