from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import enginewright
from enginewright import pipeline
from enginewright.ground.errors import ToolchainError
from enginewright.models.blocks.program_source import program_of
from enginewright.models.language import transformer_programs
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.python_program_engine import PythonProgram, source_of

IDS = np.array([[1, 4, 3, 5, 2, 0], [1, 2, 2, 2, 0, 0]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a program as two engines."""
    folder = tmp_path_factory.mktemp("made") / "out"
    targets = [{"target": "python_program"}, {"target": "onnxruntime"}]
    recipe = make({"model": "transformer_programs:tiny", "targets": targets, "validation": {"rounds": 3, "calls": 2}})
    pipeline.export(recipe, folder, force=False, progress=Progress(quiet=True))
    return folder


def test_both_engines_give_the_logits_of_the_module_to_the_last_bit(made: Path) -> None:
    report = record.read(made / "report.json")
    assert [t.name for t in report.targets if t.built and t.runnable] == ["python_program", "onnxruntime"]
    assert [output.max_abs for target in report.targets for output in target.fidelity] == [0, 0]
    program, graph = (enginewright.load(made, name) for name in ("python_program", "onnxruntime"))
    assert np.array_equal(program(ids=IDS), graph(ids=IDS))
    assert np.asarray(graph(ids=IDS)).std() > 0.5


def test_the_readme_says_how_to_run_the_source_without_anything_else(made: Path, tmp_path: Path) -> None:
    text = (made / "README.md").read_text()
    section = text[text.index("## python_program") : text.index("## onnxruntime")]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    subprocess.run(["sh", "-ec", commands.replace("DEST", str(tmp_path))], cwd=made, check=True)
    target = next(t for t in record.read(made / "report.json").targets if t.name == "python_program")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == target.bytes
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    wanted = enginewright.load(made, "onnxruntime")(ids=np.ones((1, 6), np.int64))
    assert np.array_equal(np.array(json.loads(run.stdout), np.float32), np.asarray(wanted)[0])


def test_source_that_is_not_the_models_own_is_never_run(made: Path, tmp_path: Path) -> None:
    evil, mark = tmp_path / "evil", tmp_path / "ran"
    shutil.copytree(made, evil)
    path = evil / "engines" / "python_program" / "program.py"
    code = f"open({str(mark)!r}, 'w')\n{path.read_text()}"
    path.write_text(code)
    manifest = json.loads((evil / "manifest.json").read_text())
    listed = manifest["files"]["engines/python_program/program.py"]
    listed |= {"bytes": len(code), "sha256": hashlib.sha256(code.encode()).hexdigest()}
    (evil / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ToolchainError, match="not what the artifact's model is written as"):
        enginewright.load(evil, "python_program")
    assert not mark.exists()


def test_a_network_that_is_no_program_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert source_of(nn.Linear(2, 2)) is None
    ranges = {"x": ShapeRange((1, 2), (1, 2), (1, 2))}
    graph = Graph(path=tmp_path / "model.onnx", ranges=ranges, outputs=["y"])
    with pytest.raises(ToolchainError, match="cannot be written as a Python program"):
        PythonProgram().build(graph, tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    shape = ShapeRange((1, 6), (1, 6), (1, 6))
    module = transformer_programs.build(transformer_programs.TINY)
    graph = Graph(
        path=tmp_path / "model.onnx", ranges={"a": shape, "b": shape}, outputs=["y"], source=module.python_source
    )
    with pytest.raises(ToolchainError, match="this network has 2 and 1"):
        PythonProgram().build(graph, tmp_path)
    assert module.python_source() == program_of(module)
