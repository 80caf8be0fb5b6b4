"""The declared range of a model is proven: by the graph before engines are built, by each engine, by the original."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from enginewright import at_sizes, pipeline
from enginewright.at_sizes import SizedCall
from enginewright.ground.errors import DONE, ToolchainError
from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.measure import measure
from enginewright.progress import Progress
from enginewright.recipe import Validation, make
from enginewright.reports import markdown, record
from enginewright.sources.contract import Model

QUIET = Progress(quiet=True)


def export(path: Path, body: str, *, targets: list[str] | None = None, **more: Any) -> tuple[record.Report, int]:
    """Export ``build`` of a user's file; ``body`` is what the file holds after its imports."""
    head = "import torch\nfrom torch import nn\nfrom enginewright import ModelSpec\ntorch.manual_seed(0)\n"
    (path / "net.py").write_text(head + textwrap.dedent(body))
    entries = [{"target": name} for name in (["onnxruntime"] if targets is None else targets)]
    settings = {"rounds": 3, "calls": 2, **more.pop("validation", {})}
    recipe = make({"model": f"py:{path / 'net.py'}:build", "targets": entries, "validation": settings, **more})
    return pipeline.export(recipe, path / "out", force=True, progress=QUIET)


BRANCH_ON_ONE = """
class Net(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] > 1 else x + 1

def build():
    return Net(), {"x": torch.randn(4, 3)}
"""


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt_rtx"])
def test_a_branch_at_size_1_is_found_before_an_engine_is_built(target: str, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"at batch = 1 the exported graph does not compute what the model does"):
        export(tmp_path, BRANCH_ON_ONE, targets=[target])
    assert not (tmp_path / "out").exists()


def test_a_large_graph_is_run_on_its_own_where_memory_is_free_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_sizes, "LARGEST_GRAPH", 0)
    monkeypatch.setattr(at_sizes.machine, "free_memory", lambda: 10**12)
    with pytest.raises(ToolchainError, match="at batch = 1 the exported graph does not compute what the model does"):
        export(tmp_path, BRANCH_ON_ONE)
    monkeypatch.setattr(at_sizes.machine, "free_memory", lambda: 10)
    report, _ = export(tmp_path, BRANCH_ON_ONE)
    assert "larger than 2 GB and than a quarter of the memory that is free" in report.validation["graph"]


def test_a_size_frozen_inside_the_graph_is_named_with_its_node(tmp_path: Path) -> None:
    body = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            a = self.lstm(x)[0]
            return a * x[..., :1].expand_as(a)

    def build():
        axes = {0: ("batch", 1, 8), 1: ("time", 2, 40)}
        return ModelSpec(module=Net(), inputs={"x": torch.randn(2, 6, 4)}, dynamic={"x": axes})
    """
    with pytest.raises(ToolchainError, match=r"does not hold at time = \d+: .*Expand") as caught:
        export(tmp_path, body)
    assert "Expand" in str(caught.value.where)


PATCHES = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, frames):
        batch, time, width = frames.shape
        return self.head(frames.reshape(batch, time // 4, 4 * width))

def build():
    axes = {0: ("batch", 1, 8), 1: TIME}
    return ModelSpec(module=Net(), inputs={"frames": torch.randn(2, EXAMPLE, 16)}, dynamic={"frames": axes})
"""


@pytest.mark.parametrize("example", [4, 12])
def test_a_model_that_takes_multiples_says_how_to_declare_them(example: int, tmp_path: Path) -> None:
    body = PATCHES.replace("EXAMPLE", str(example)).replace("TIME", "('time', 4, 64)")
    with pytest.raises(ToolchainError, match=r"declared for time from 4 to 64, but does not take time = \d+") as caught:
        export(tmp_path, body)
    assert caught.value.help == "it seems to take multiples of 4: declare ('time', 4, 64, 4)"


def test_declared_multiples_are_run_and_other_sizes_refused_in_words(tmp_path: Path) -> None:
    import enginewright

    body = PATCHES.replace("EXAMPLE", "4").replace("TIME", "('time', 4, 64, 4)")
    report, code = export(tmp_path, body)
    assert code == DONE
    (target,) = report.targets
    assert {check.verdict for check in target.sizes} == {"met"}
    assert {check.sizes["time"] for check in target.sizes} == {4, 12, 64}
    assert {check.sizes["batch"] for check in target.sizes} >= {1, 8}
    assert "also run at" in markdown.render(report)
    assert "also run at" in (tmp_path / "out" / "report.html").read_text().lower()
    assert record.read(tmp_path / "out" / "report.json").targets[0].sizes == target.sizes
    assert "run in ONNX Runtime at" in report.validation["graph"]
    engine = enginewright.load(tmp_path / "out")
    assert engine(frames=torch.randn(3, 20, 16)).shape == (3, 5, 5)
    with pytest.raises(ToolchainError, match=r"time is 10; the model takes multiples of 4 from 4 to 64"):
        engine(frames=torch.randn(3, 10, 16))


MASKED = """
class Net(nn.Module):
    def forward(self, x, keep):
        mask = keep[:, None, None, :]
        return ATTEND

def build():
    return Net(), {"x": torch.randn(2, 4, 8), "keep": torch.ones(2, 4, dtype=torch.bool)}
"""


def test_the_example_comes_first_and_masks_are_mixed(tmp_path: Path) -> None:
    attend = "nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)"
    report, code = export(tmp_path, MASKED.replace("ATTEND", attend), gates=["fidelity.relative_l2 <= 1e-5"])
    assert code == DONE
    assert report.validation["inputs"].startswith("the model's own example; then random")
    assert report.validation["inputs"].endswith("the ranges of x, keep were guessed")


def test_a_model_that_answers_a_hidden_row_with_nan_is_still_exported(tmp_path: Path) -> None:
    attend = "(x @ x.transpose(1, 2)).masked_fill(~keep[:, None], -torch.inf).softmax(-1) @ x"
    _, code = export(tmp_path, MASKED.replace("ATTEND", attend), gates=["fidelity.relative_l2 <= 1e-5"])
    assert code == DONE


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


BATCH = Dim(name="batch", low=1, typical=4, high=9)
MODEL = Model(
    name="doubled", module=Doubled(), inputs=(InputSpec(name="x", shape=(BATCH, 3)),), outputs=("y",), weights=""
)


def measured(engine: Callable[[Arrays], Arrays]) -> dict[str, Any]:
    original = at_sizes.eager(MODEL, threads=1)
    calls = list(at_sizes.sized_calls(MODEL, original, seed=0))
    settings = Validation(calls=1, rounds=3)
    found, _ = measure(MODEL, original, {"e": engine}, settings, seed=0, threads=1, progress=QUIET, sized=calls)
    return found["e"]


def test_an_engine_that_is_wrong_at_one_size_is_faulty() -> None:
    found = measured(lambda call: {"y": call["x"] * (3 if len(call["x"]) == 1 else 2)})
    assert [fault.split(":")[0] for fault in found["faults"]] == ["at batch = 1"]
    assert [(check.sizes["batch"], check.verdict) for check in found["sizes"]] == [
        (1, "missed"),
        (5, "met"),
        (9, "met"),
    ]


def test_an_engine_that_fails_at_one_size_is_faulty_in_words() -> None:
    def engine(call: Arrays) -> Arrays:
        if len(call["x"]) > 5:
            raise ToolchainError("it has no memory for that")
        return {"y": 2 * call["x"]}

    assert measured(engine)["faults"] == ["at batch = 9: it has no memory for that"]


def test_a_single_choice_that_falls_otherwise_is_no_wrong_size() -> None:
    calls: list[int] = []

    def engine(call: Arrays) -> Arrays:
        calls.append(len(call["x"]))
        return {"y": call["x"] * (3 if calls.count(9) == 1 and len(call["x"]) == 9 else 2)}

    assert "faults" not in measured(engine)
    assert calls.count(9) == 2


def test_what_is_too_large_is_said_not_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enginewright.validation.sizes.BYTES", 100)
    found = measured(lambda call: {"y": 2 * call["x"]})
    left = [check for check in found["sizes"] if check.verdict == "not_measured"]
    assert [check.sizes["batch"] for check in left] == [5, 9]
    assert all("GB" in check.reason for check in left)
    assert "faults" not in found


def test_a_model_of_a_library_that_refuses_a_size_is_not_measured_there() -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 9:
                raise ValueError("nine is too many")
            return x

    model = replace(MODEL, module=Picky())
    calls = list(at_sizes.sized_calls(model, at_sizes.eager(model, 1), seed=0))
    assert [call.reason for call in calls if call.sizes["batch"] == 9] == [
        "the original itself refuses it: the model does not take batch = 9 (x (9, 3)): nine is too many"
    ]
    with pytest.raises(ToolchainError, match=r"declared for batch from 1 to 9, but does not take batch = 9: nine is"):
        owned = replace(model, example={"x": np.zeros((4, 3), np.float32)})
        list(at_sizes.sized_calls(owned, at_sizes.eager(owned, 1), seed=0))


def test_sizes_of_towers_change_apart() -> None:
    texts, images = Dim(name="texts", low=1, typical=2, high=8), Dim(name="images", low=1, typical=1, high=4)
    inputs = (InputSpec(name="a", shape=(texts, 3)), InputSpec(name="b", shape=(images, 3)))
    model = replace(MODEL, inputs=inputs, module=Towers(), outputs=("y",))
    calls = list(at_sizes.sized_calls(model, at_sizes.eager(model, 1), seed=0))
    assert {call.wanted["y"].shape for call in calls} >= {(1, 1), (8, 1), (1, 4), (8, 4)}
    assert not any(call.reason for call in calls)


class Towers(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b.T


def test_a_call_without_the_original_is_not_measured() -> None:
    found = at_sizes.at_one_size(
        lambda call: call, SizedCall({"batch": 9}, reason="too large"), 0.0, lambda at: ({}, {})
    )
    assert (found.verdict, found.reason) == ("not_measured", "too large")


def test_padding_that_is_answered_otherwise_is_no_fault_at_any_size_and_a_real_row_is() -> None:
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    inputs = {"x": np.ones((2, 4)), "attention_mask": mask}
    wanted = {"y": np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)}
    call = SizedCall({"batch": 2}, inputs, wanted, mask="attention_mask")
    for row, verdict in ((3, "met"), (1, "missed")):
        got = {"y": wanted["y"].copy()}
        got["y"][1, row] = 9

        def answer(call: Arrays, got: Arrays = got) -> Arrays:
            return got

        found = at_sizes.at_one_size(answer, call, 0.0, lambda at: (inputs, wanted))
        assert found.verdict == verdict
    found = at_sizes.at_one_size(lambda call: {"y": wanted["y"][:1]}, call, 0.0, lambda at: (inputs, wanted))
    assert "has shape (1, 4, 3)" in found.reason
