"""A graph as the original: computed as it is written, so that engines do not share their optimizer's mistakes."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from enginewright import sources
from enginewright.passes.kernel.graph_module import GraphModule
from enginewright.targets.pytorch_engine import EagerRunner
from tests.graphs import mixed


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The optimization levels of the sessions that are opened."""
    found: list[object] = []
    true = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, **named: found.append(options.graph_optimization_level) or true(path, options, **named),
    )
    return found


def test_the_original_is_computed_as_it_is_written_and_timed_as_it_is_used(
    tmp_path: Path, levels: list[object]
) -> None:
    model = sources.load(f"onnx:{mixed(tmp_path / 'm.onnx')}")
    assert isinstance(model.module, GraphModule)
    runner = EagerRunner(model.module, threads=1, outputs=model.outputs)
    (call,) = model.batches(1, 0)
    exact, used = runner(call), runner.as_timed()(call)
    every = onnxruntime.GraphOptimizationLevel
    assert levels == [every.ORT_DISABLE_ALL, every.ORT_ENABLE_ALL]
    assert exact.keys() == used.keys()


def test_a_module_of_pytorch_is_timed_as_it_is() -> None:
    runner = EagerRunner(torch.nn.Linear(2, 2), threads=1)
    assert runner.as_timed() is runner
