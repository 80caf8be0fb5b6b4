from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enginewright.ground.runner import clock_of, device_of, inputs_for, to_device_of
from enginewright.targets import tensorrt_builder
from enginewright.targets.contract import Answer, Graph, LayerHint
from enginewright.targets.tensorrt_builder import EngineRunner, refusal
from enginewright.targets.tensorrt_engine import TensorRt


def test_without_its_module_or_a_gpu_it_says_which_is_missing() -> None:
    able = TensorRt().availability()
    if not able.buildable.yes:
        assert any(word in able.why_not("buildable") for word in ("enginewright[tensorrt]", "NVIDIA", "not importable"))


def test_a_refusal_names_operators_or_the_first_error() -> None:
    log = ["[E] In node 1 with name: a and operator: NonZero (x)", "[E] In node 2 with name: b and operator: Det (x)"]
    assert refusal(log, "Parse") == "the parser refuses these operators: Det, NonZero"
    assert refusal(["[E] out of memory"], "Build") == "Build; out of memory"
    assert refusal([], "Build") == "Build"


def test_a_refusal_keeps_the_node_the_reason_and_what_helps() -> None:
    log = [
        "[E] ModelImporter.cpp:140: While parsing node number 0 [QuantizeLinear -> q]:",
        "[E] In node 0 with name: quantize_input and operator: QuantizeLinear (buildZeroPointTensor): INVALID_NODE: "
        "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported. Please set kENABLE to …",
    ]
    assert refusal(log, "Parse") == (
        "the parser refuses these operators: QuantizeLinear; node 'quantize_input': Non-zero zero point is not "
        "supported; quantize symmetrically, with zero points of 0 (int8), as quantize_int8 does"
    )


def test_sparse_weights_are_asked_for_where_a_pass_made_some() -> None:
    plain = {"a": LayerHint(precision="int8")}
    sparse = {**plain, "b": LayerHint(pattern="2:4")}
    asked = [
        TensorRt().request(Graph(path=Path("m"), ranges={}, hints=h), Path("f"))["sparse"] for h in (plain, sparse)
    ]
    assert asked == [False, True]


class FakeEngine:
    """Polygraphy's way: outputs of every call lie in one buffer, on the side that was asked for."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(2)
        self.taken: list[Any] = []
        self.engine = self
        self.num_io_tensors = 3

    def get_tensor_name(self, number: int) -> str:
        return ("x", "sizes", "y")[number]

    def is_shape_inference_io(self, name: str) -> bool:
        return name == "sizes"

    def infer(self, inputs: Any, copy_outputs_to_host: bool = True) -> Any:
        self.taken.append(inputs["x"])
        self.buffer.copy_(-torch.as_tensor(inputs["x"]))
        return {"y": self.buffer.numpy() if copy_outputs_to_host else self.buffer}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says that it has CUDA, and its tensors stay where they are."""
    monkeypatch.setattr(tensorrt_builder, "has_cuda", lambda: Answer(True))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    monkeypatch.setattr("enginewright.targets.devices.written", lambda device: None)


@pytest.mark.usefixtures("gpu")
def test_tensors_go_in_and_out_of_an_engine_and_stay_when_it_runs_again() -> None:
    engine = FakeEngine()
    runner = EngineRunner(engine)
    x = torch.ones(2)
    first = runner({"x": x})["y"]
    second = runner({"x": 2 * x})["y"]
    assert engine.taken[0] is x
    assert (first.tolist(), second.tolist()) == ([-1, -1], [-2, -2])


@pytest.mark.usefixtures("gpu")
def test_arrays_come_back_as_arrays_though_the_engine_gives_tensors() -> None:
    engine = FakeEngine()
    found = EngineRunner(engine)({"x": np.ones(2, np.float32)})["y"]
    assert isinstance(engine.taken[0], torch.Tensor)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [-1, -1]


def test_without_cuda_in_pytorch_an_engine_takes_arrays_and_its_results_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "has_cuda", lambda: Answer(False, "built without CUDA"))
    runner = EngineRunner(FakeEngine())
    assert (device_of(runner), to_device_of(runner), clock_of(runner)) == ("cuda:0", None, time.perf_counter)
    first = runner({"x": np.ones(2, np.float32)})["y"]
    runner({"x": np.zeros(2, np.float32)})
    assert first.tolist() == [-1, -1]


def test_shapes_stay_on_the_host_where_an_engine_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "has_cuda", lambda: Answer(True))
    moved: list[tuple[str, str]] = []

    def tensors_on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
        moved.extend((name, device) for name in inputs)
        return inputs

    monkeypatch.setattr(tensorrt_builder, "tensors_on", tensors_on)
    runner = EngineRunner(FakeEngine())
    runner({"x": torch.ones(2), "sizes": torch.ones(1)})
    assert sorted(moved) == [("sizes", "cpu"), ("x", "cuda:0")]
    moved.clear()
    inputs_for(runner, {"x": np.ones(2, np.float32), "sizes": np.ones(1)})
    assert sorted(moved) == [("sizes", "cpu"), ("x", "cuda:0")]
