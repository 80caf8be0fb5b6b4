from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.models.blocks.program_source import program_of
from enginewright.models.blocks.sequences import TASKS
from enginewright.models.language import transformer_programs
from enginewright.models.language.transformer_programs import TransformerProgram
from enginewright.targets.onnx_export import export_onnx

TINY = transformer_programs.TINY


def logits_of(source: str) -> Callable[[np.ndarray], np.ndarray]:
    names: dict[str, Any] = {"__name__": "program"}
    exec(source, names)
    return lambda ids: np.array([names["logits_of"](row) for row in ids.tolist()], dtype=np.float32)


def in_onnxruntime(module: TransformerProgram, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    example = torch.ones(2, module.config.longest, dtype=torch.int64)
    path = folder / "model.onnx"
    dynamic = {"ids": {0: ("batch", 1, 100_000)}}
    export_onnx(module, {"ids": example}, dynamic=dynamic, outputs=["logits"], path=path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda ids: np.asarray(session.run(None, {"ids": ids})[0])


@torch.no_grad()
def agree(module: TransformerProgram, ids: np.ndarray, folder: Path) -> None:
    """PyTorch, ONNX Runtime and the source give the same logits, to the last bit, for any number of sequences."""
    wanted = module(torch.from_numpy(ids)).numpy()
    assert wanted.std() > 0.5
    engine = in_onnxruntime(module, folder)
    assert all(np.array_equal(engine(ids[:count]), wanted[:count]) for count in (1, 7, len(ids)))
    assert np.array_equal(logits_of(program_of(module))(ids), wanted)


def any_tokens(module: TransformerProgram, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, module.config.vocabulary, (count, module.config.longest))


def trained(size: str) -> TransformerProgram:
    module = sources.load(f"transformer_programs:{size}").module
    assert isinstance(module, TransformerProgram)
    return module


def test_source_graph_and_module_agree_on_any_tokens(tmp_path: Path) -> None:
    agree(trained("sort"), any_tokens(trained("sort"), 2000), tmp_path)


@pytest.mark.parametrize("size", transformer_programs.SHIPPED)
@torch.no_grad()
def test_the_source_of_every_trained_program_gives_its_logits(size: str) -> None:
    ids = any_tokens(trained(size), 500)
    assert np.array_equal(logits_of(program_of(trained(size)))(ids), trained(size)(torch.from_numpy(ids)).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("size", transformer_programs.SHIPPED)
def test_source_graph_and_module_agree_on_many_tokens_and_all_short_sequences(size: str, tmp_path: Path) -> None:
    task = TASKS[size]
    short = [task.tokens(list(s)) for n in range(5) for s in itertools.product(range(task.symbols), repeat=n)]
    agree(trained(size), np.concatenate([any_tokens(trained(size), 50_000), short]), tmp_path)


def test_a_causal_program_agrees_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = transformer_programs.build(replace(TINY, is_causal=True))
    agree(module, any_tokens(module, 500), tmp_path)


@torch.no_grad()
def test_counts_above_the_most_are_read_as_the_most() -> None:
    torch.manual_seed(0)
    module = transformer_programs.build(replace(TINY, most=2))
    ids, source = any_tokens(module, 500), program_of(module)
    wanted = module(torch.from_numpy(ids)).numpy()
    assert "[min(count, 2) for count in summed_1_" in source
    assert np.array_equal(logits_of(source)(ids), wanted)
    assert not np.array_equal(logits_of(source.replace("min(count, 2)", "count"))(ids), wanted)


def test_the_source_needs_no_package_and_answers_on_the_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = transformer_programs.build(TINY)
    path = tmp_path / "program.py"
    path.write_text(program_of(module))
    run = subprocess.run([sys.executable, "-I", "-S", path, "1", "4", "3"], capture_output=True, text=True, check=True)
    wanted = module(torch.tensor([[1, 4, 3, 0, 0, 0]])).argmax(2)[0, :3].tolist()
    assert [int(label) for label in run.stdout.split()] == wanted
    assert max(len(line) for line in path.read_text().splitlines()) <= 120


def test_a_program_that_steps_have_changed_is_not_written() -> None:
    torch.manual_seed(0)
    module = transformer_programs.build(TINY)
    with torch.no_grad():
        module.count_scores.weight[0, 0] += 0.001
    with pytest.raises(ToolchainError, match="no longer multiples"):
        program_of(module)
    module.count_scores = torch.nn.Sequential(module.count_scores)  # type: ignore[assignment]
    with pytest.raises(ToolchainError, match="has replaced a layer"):
        program_of(module)
