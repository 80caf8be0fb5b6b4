"""What is noticed before a model is loaded, with or without a pass that would read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from enginewright import pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.targets.contract import Answer, Availability
from enginewright.targets.tensorrt_engine import TensorRt

QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*args: object, **more: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(sources, "load", too_late)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"calibration": {"file": "gone.txt"}}, "no calibration file 'gone.txt'"),
        ({"calibration": {"file": "."}}, "'.' is a folder, and a file is wanted"),
        ({"weights": "gone.safetensors"}, "no weights file 'gone.safetensors'"),
        ({"steps": [{"pass": "fold_adapters", "file": "lora.safetensors"}]}, "no file 'lora.safetensors'"),
        ({"steps": [{"pass": "distill", "data": "calls.safetensors"}]}, "no file 'calls.safetensors'"),
        ({"steps": [{"pass": "distill", "teachers": [{"model": "hf:./gone"}]}]}, "no file or folder './gone'"),
        ({"steps": [{"pass": "distill", "teachers": [{"model": "my-model"}]}]}, "no model named 'my-model'"),
        ({"steps": [{"pass": "merge_models", "teachers": ["a.safetensors"]}]}, "no file 'a.safetensors'"),
        ({"steps": [{"pass": "select_heads", "score": "mine.py:score"}]}, "no file of a score 'mine.py'"),
        ({"steps": [{"pass": "select_heads", "score": "fidelty"}]}, "did you mean 'fidelity'"),
        ({"steps": [{"pass": "approximate_by_accuracy", "losses": "l.py:f"}]}, "no file of a score 'l.py'"),
    ],
)
def test_a_missing_file_is_noticed_before_work(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    recipe = make({"model": "dit:tiny", **content}, folder=tmp_path)
    for work in (lambda: pipeline.decide(recipe, QUIET), lambda: export(recipe, tmp_path)):
        with pytest.raises(ToolchainError) as caught:
            work()
        assert said in str(caught.value)
        assert caught.value.exit_code == 2


def export(recipe: Any, folder: Path) -> None:
    pipeline.export(recipe, folder / "out", force=False, progress=QUIET)


def test_files_that_are_made_on_the_way_need_not_be_there(tmp_path: Path) -> None:
    steps = [
        {"pass": "distill", "checkpoint": "kept"},
        {"pass": "select_heads", "mode": "prune", "log": "log.jsonl"},
        {"pass": "prune_tokens", "score": "received"},  # no name of a function, and of no file
    ]
    for step in steps:
        with pytest.raises(AssertionError, match="a model was loaded"):
            pipeline.decide(make({"model": "dit:tiny", "steps": [step]}, folder=tmp_path), QUIET)


def test_tokens_scores_are_no_score_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a model was loaded"):
        pipeline.decide(make({"model": "dit:tiny", "steps": [{"pass": "prune_tokens"}]}, folder=tmp_path), QUIET)
    step = {"pass": "prune_tokens", "method": "policy", "weights": "gone.safetensors"}
    with pytest.raises(ToolchainError, match=r"no file 'gone\.safetensors'"):
        pipeline.decide(make({"model": "dit:tiny", "steps": [step]}, folder=tmp_path), QUIET)


def test_a_target_that_cannot_be_built_here_ends_in_3_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no = Answer(False, "no NVIDIA driver in this test")
    able = Availability(installed=Answer(True), importable=Answer(True), buildable=no, runnable=no)
    monkeypatch.setattr(TensorRt, "availability", lambda self: able)
    content = {"model": "dit:tiny", "steps": [{"pass": "quantize_int8"}], "targets": [{"target": "tensorrt"}]}
    with pytest.raises(ToolchainError, match=r"no NVIDIA driver in this test(.|\n)*optional=true") as caught:
        export(make(content), tmp_path)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir())

    optional = make({**content, "targets": [{"target": "tensorrt", "optional": True}]})
    with pytest.raises(AssertionError, match="a model was loaded"):
        pipeline.export(optional, tmp_path / "out", force=False, progress=Progress())
    assert "tensorrt is optional and cannot be built here" in capsys.readouterr().err
