"""Without a GPU: what PyTorch is asked for stands in for what it does, and the meta device for another device."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from enginewright.ground.errors import UnavailableError
from enginewright.ground.runner import clock_of, device_of, inputs_for
from enginewright.targets import devices
from enginewright.targets.contract import Answer
from enginewright.targets.devices import clock_on, holds_tensors, on_host, tensor_of, tensors_on
from enginewright.targets.pytorch_engine import EagerRunner, PyTorch, copied_to

X = np.ones((2, 4), np.float32)


def test_a_reading_on_cuda_waits_for_the_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(f"wait for {device}"))
    monkeypatch.setattr(time, "perf_counter", lambda: seen.append("read") or 7.0)
    assert clock_on("cuda:0")() == 7.0
    assert seen == ["wait for cuda:0", "read"]
    assert clock_on("cpu")() == 7.0
    assert seen[2:] == ["read"]


def test_tensors_on_the_cpu_are_the_arrays_own_memory_and_back() -> None:
    tensor = tensors_on("cpu", {"x": X})["x"]
    assert tensor.data_ptr() == X.ctypes.data
    assert on_host({"x": tensor})["x"].ctypes.data == X.ctypes.data
    assert tensor_of(tensor) is tensor
    assert holds_tensors({"x": tensor})
    assert not holds_tensors({"x": X})


def test_what_is_placed_on_cuda_is_whole_before_another_runtime_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Stream:
        def synchronize(self) -> None:
            seen.append("written")

    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: seen.append(device) or tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    tensors_on("cuda:0", {"x": X})
    assert seen == ["cuda:0", "written"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.shift


def test_a_copy_for_a_device_leaves_the_module_as_it_is_and_keeps_what_is_tied() -> None:
    module = Tied().eval()
    copy = copied_to("meta", module)
    assert {each.device.type for each in (*copy.parameters(), *copy.buffers())} == {"meta"}
    assert copy.second.weight is copy.first.weight
    assert {each.device.type for each in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert copied_to("cpu", module).first.weight.data_ptr() == module.first.weight.data_ptr(), "no copy where it lies"


def test_tensors_in_tensors_out_where_the_runner_runs() -> None:
    runner = EagerRunner(Tied().eval(), threads=1, outputs=["y"], device="meta")
    assert device_of(runner) == "meta"
    given = inputs_for(runner, {"x": X})
    assert given["x"].device.type == "meta"
    assert runner(given)["y"].device.type == "meta"


def test_on_the_cpu_it_answers_in_kind_and_takes_no_detour() -> None:
    runner = EagerRunner(Tied().eval(), threads=1, outputs=["y"])
    call = {"x": X}
    assert inputs_for(runner, call) is call
    assert clock_of(runner) is time.perf_counter
    array, tensor = runner(call)["y"], runner({"x": torch.from_numpy(X)})["y"]
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, tensor.numpy())


def test_the_original_is_copied_to_cuda_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = EagerRunner(Tied().eval(), threads=1, outputs=["y"])
    monkeypatch.setattr("enginewright.targets.pytorch_engine.has_cuda", lambda: Answer(False, "no NVIDIA driver"))
    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        runner.as_timed("cuda:0")
    monkeypatch.setattr("enginewright.targets.pytorch_engine.has_cuda", lambda: Answer(True))
    there = runner.as_timed("meta")
    assert (there.device, there.outputs) == ("meta", ["y"])
    assert runner.module.first.weight.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_cuda_a_copy_says_why_and_the_target_does_not_run() -> None:
    with pytest.raises(UnavailableError, match="cannot be copied to cuda:0: Torch not compiled with CUDA"):
        copied_to("cuda:0", Tied())
    able = PyTorch(device="cuda").availability()
    assert able.buildable.yes
    assert not able.runnable.yes


def test_a_driver_and_a_pytorch_without_cuda_are_two_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.machine, "gpu", lambda: Answer(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.has_cuda() == Answer(False, "this PyTorch was built without CUDA")


@pytest.mark.gpu
def test_on_a_gpu_values_stay_there_and_agree() -> None:
    module = Tied().eval()
    runner = EagerRunner(module, threads=1, outputs=["y"], device="cuda:0")
    given = inputs_for(runner, {"x": X})
    assert runner(given)["y"].device.type == "cuda"
    np.testing.assert_allclose(
        runner({"x": X})["y"], EagerRunner(module, threads=1, outputs=["y"])({"x": X})["y"], 1e-4
    )
