"""An artifact's README: what it says to copy is enough, and its code runs with nothing of ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enginewright import artifact as artifacts
from enginewright import pipeline
from enginewright.opened import open_subject
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import deploying, record
from enginewright.reports.deploying import Engine, Value
from tests.reports.example import example_report


def blocks(folder: Path, language: str) -> list[str]:
    text = (folder / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def followed(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Do what an artifact's README says, with the artifact gone when the code runs; the outputs of its code."""
    away = tmp_path / "elsewhere"
    away.mkdir()
    shutil.copytree(folder, tmp_path / "artifact")
    (commands,) = blocks(folder, "sh")
    subprocess.run(["sh", "-ec", commands.replace("DEST", str(away))], cwd=tmp_path / "artifact", check=True)
    shutil.rmtree(tmp_path / "artifact")
    code = blocks(folder, "python")[0]
    assert "enginewright" not in code
    script = f"{code}\nimport sys\nassert 'enginewright' not in sys.modules\nnp.savez('found.npz', **outputs)\n"
    run = subprocess.run([sys.executable, "-I", "-c", script], cwd=away, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    copied = sum(path.stat().st_size for path in away.rglob("*") if path.is_file() and path.name != "found.npz")
    target = next(t for t in record.read(folder / "report.json").targets if t.name == "onnxruntime")
    assert copied == target.bytes == sum(target.files.values())
    return dict(np.load(away / "found.npz"))


def test_an_engine_in_8_bits_runs_elsewhere(artifact: Path, tmp_path: Path) -> None:
    found = followed(artifact, tmp_path)
    runner = open_subject(f"{artifact}#onnxruntime").runners["onnxruntime"]
    call = {
        "x": np.full((1, 4, 8, 8), 1, np.float32),
        "t": np.full((1,), 1, np.float32),
        "y": np.full((1,), 1, np.int64),
    }
    for name, array in runner(call).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5)
    assert artifacts.read_manifest(artifact)["files"]["README.md"]
    assert str(artifact) not in (artifact / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "steps"),
    [
        ("dit:tiny", []),
        ("dit:tiny", [{"pass": "hoist_constants", "constant": ["t"]}]),
        ("dit:tiny", [{"pass": "slice_width_by_timestep", "importance": "activation", "steps": 6, "buckets": 2}]),
        ("dit:tiny", [{"pass": "reuse_blocks", "interval": 3, "steps": 4}]),
        ("styleswin:tiny", []),
    ],
)
def test_every_form_of_an_artifact_runs_elsewhere(model: str, steps: list[dict[str, Any]], tmp_path: Path) -> None:
    recipe = make(
        {
            "model": model,
            "steps": steps,
            "targets": [{"target": "onnxruntime"}],
            "validation": {"rounds": 3, "calls": 2},
            "calibration": {"calls": 2},
        }
    )
    pipeline.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    found = followed(tmp_path / "out", tmp_path)
    assert {"prediction_and_variance", "image"} & found.keys()
    assert all(np.isfinite(array).all() for array in found.values())


def test_code_for_tensorrt_is_python_that_names_the_inputs() -> None:
    """No GPU here: it is compiled and read, and run on the machines of those who have one."""
    engine = Engine(
        kind="tensorrt_rtx",
        folder="tensorrt_rtx",
        file="engine.plan",
        files={"engines/tensorrt_rtx/engine.plan": 7_799_797},
        inputs=[Value(name="x", dtype="float32", shape=(1, 4), said="(batch 1 to 8, 4)")],
        outputs=[Value(name="y", dtype="float32")],
    )
    text = deploying.render(example_report(), {"tensorrt_rtx": [engine]})
    assert "7,799,797" in text
    assert "cp -r engines/tensorrt_rtx DEST/" in text
    (code, _) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "readme", "exec")
    assert "import tensorrt_rtx as trt" in code
    assert '"x": torch.full((1, 4), 1, dtype=torch.float32, device="cuda"),  # (batch 1 to 8, 4)' in code
    assert "## onnxruntime" not in text


def test_files_outside_an_engines_folder_are_listed_one_by_one() -> None:
    engine = Engine(
        kind="onnxruntime", folder="onnxruntime", file="model.onnx", files={"model.onnx": 1, "weights/a b.bin": 2}
    )
    assert deploying.placed([engine]) == ["model.onnx", "weights/a b.bin"]
    assert deploying.copying([engine]) == [
        "mkdir -p DEST/onnxruntime && cp model.onnx DEST/onnxruntime/",
        "mkdir -p DEST/onnxruntime/weights && cp 'weights/a b.bin' DEST/onnxruntime/weights/",
    ]
    module = Engine(kind="module", folder="pytorch", files={"engines/pytorch/engine.json": 3})
    assert deploying.placed([module]) == []
