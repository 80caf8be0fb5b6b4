"""Every type of model that transformers knows, made tiny: it is loaded and exported, or refused in a sentence."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import draw
from tests.toolchain.sources.tiny_transformers import shrink

T: Any = pytest.importorskip("transformers")

PARTS = 48
"""Tests that the models are dealt out to."""
SECONDS = 300
"""For one model, on a busy machine; building and exporting take a few."""
LARGEST = 12_000_000
"""Parameters above which a model was not made tiny, because its configuration names its sizes otherwise."""
KNOWN = {
    "BailingHybridModel": "a loop over single tokens, which the exporter unrolls for minutes",
}
"""Models that end neither in an engine nor in a sentence, and why."""


def names() -> list[tuple[str, str]]:
    """Every type of model and its class without a head."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    pairs = [
        (kind, name)
        for kind, found in MODEL_MAPPING_NAMES.items()
        for name in ([found] if isinstance(found, str) else found)
    ]
    return sorted(dict.fromkeys(pairs))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_model_is_exported_or_refused_in_a_sentence(part: int) -> None:
    found = {name: outcome(kind, name) for kind, name in names()[part::PARTS]}
    print(json.dumps(found, indent=1))
    unexplained = {name: said for name, said in found.items() if said.startswith("fault") and name not in KNOWN}
    assert not unexplained, json.dumps(unexplained, indent=1)


def outcome(kind: str, name: str) -> str:
    """What became of a model in a process of its own: a crash or a hang is a result too."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            said = tried(kind, name)
        except BaseException:
            said = f"fault: {traceback.format_exc()[-1500:]}"
        os.write(writing, said.encode()[:60_000])
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], SECONDS)
    said = os.read(reading, 70_000).decode() if ready else ""
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    if said:
        return said
    return f"fault: killed by signal {os.WTERMSIG(status)}" if ready else f"fault: not done after {SECONDS} s"


def tried(kind: str, name: str) -> str:
    """Build a tiny model, save it, load it as a user would, and export it."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as engine:
        try:
            config, cls = shrink(T.CONFIG_MAPPING[kind]()), getattr(T, name)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in cls(config).parameters())
            if size > LARGEST:
                return f"not tiny: {size:,} parameters"
            cls(config).eval().save_pretrained(folder)
        except Exception as cause:
            return f"not built: {cause}"
        try:
            model = sources.load(f"hf:{folder}")
            sizes = {d.name: max(2, d.typical) for spec in model.inputs for d in spec.shape if isinstance(d, Dim)}
            dynamic = {
                spec.name: {i: (d.name, d.low, d.high) for i, d in enumerate(spec.shape) if isinstance(d, Dim)}
                for spec in model.inputs
            }
            example = {key: torch.from_numpy(a) for key, a in draw(model.inputs, seed=0, sizes=sizes).items()}
            path = Path(engine) / "model.onnx"
            export_onnx(model.module, example, dynamic=dynamic, outputs=model.outputs, path=path)
        except ToolchainError as error:
            return f"refused: {error.message}"
        return f"exported: {', '.join(example)}"


def test_a_crash_and_a_traceback_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "tried", lambda kind, name: os.kill(os.getpid(), signal.SIGSEGV))
    assert outcome("", "") == f"fault: killed by signal {int(signal.SIGSEGV)}"
    monkeypatch.setattr(module, "tried", lambda kind, name: 1 / 0)
    assert "ZeroDivisionError" in outcome("", "")
    monkeypatch.setattr(module, "tried", lambda kind, name: "refused: it")
    assert outcome("", "") == "refused: it"
