"""What targets get of a network beside its graph: traced when one of them asks, and once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from enginewright import pipeline, tracing
from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Runner
from enginewright.progress import Progress
from enginewright.recipe import TargetStep, make
from enginewright.targets.contract import Answer, Availability, Built, Graph, Target
from tests import graphs

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Linear(8, 4), {"input": torch.zeros(3, 8)}
"""


class Other(Target):
    """A target of somebody else's."""

    formats: ClassVar[dict[str, str]] = {}
    runs_module: ClassVar[bool] = True
    seen: ClassVar[list[Any]] = []
    asks: bool = True

    def availability(self) -> Availability:
        yes = Answer(True)
        return Availability(installed=yes, importable=yes, buildable=yes, runnable=Answer(False, "it never does"))

    def build(self, graph: Graph, folder: Path) -> Built:
        self.seen.append(graph.program and (graph.program() if self.asks else graph.program))
        return Built()

    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module]) -> Runner:
        raise AssertionError("it never runs")


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what is traced into a program that is no graph."""
    found: list[int] = []
    export = tracing.export_program

    def counted(*args: Any, **more: Any) -> Any:
        found.append(1)
        return export(*args, **more)

    monkeypatch.setattr(tracing, "export_program", counted)
    return found


def built(folder: Path, *targets: Target, **more: Any) -> list[Any]:
    """What each target saw."""
    Other.seen.clear()
    (folder / "net.py").write_text(NET)
    recipe = make({"model": "py:net.py:build", "validation": {"skip": True}, **more}, folder=folder)
    steps = tuple(TargetStep(target=target, called=f"number_{i}") for i, target in enumerate(targets))
    pipeline.export(replace(recipe, targets=steps), folder / "out", force=False, progress=Progress(quiet=True))
    return list(Other.seen)


def test_a_target_of_another_package_gets_the_program_with_open_sizes(tmp_path: Path, traces: list[int]) -> None:
    first, second = built(tmp_path, Other(), Other())
    assert first is second
    assert traces == [1], "nothing is traced twice"
    module = first.module()
    assert module(input=torch.ones(5, 8)).shape == (5, 4)
    assert module(input=torch.ones(1, 8)).shape == (1, 4)


def test_nothing_is_traced_where_no_target_asks(tmp_path: Path, traces: list[int]) -> None:
    (seen,) = built(tmp_path, Other(asks=False))
    assert callable(seen)
    assert traces == []


def test_a_program_goes_when_the_targets_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is in memory any more when engines are timed."""
    validate, left = pipeline.validate, []

    def looked_at(*args: Any) -> Any:
        made = weakref.ref(Other.seen.pop())
        gc.collect()
        left.append(made())
        return validate(*args)

    monkeypatch.setattr(pipeline, "validate", looked_at)
    built(tmp_path, Other())
    assert left == [None]


def test_half_precision_of_the_export_is_no_program_and_says_what_to_do(tmp_path: Path) -> None:
    found = tracing.program_on_demand(None, nn.Linear(1, 1), dict, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ToolchainError, match="float16 was asked for") as caught:
        found()
    assert "convert_dtype" in str(caught.value.help)


def test_a_graph_has_no_program(tmp_path: Path) -> None:
    path = graphs.mixed(tmp_path / "m.onnx")
    assert built(tmp_path, Other(), model=f"onnx:{path}") == [None]
