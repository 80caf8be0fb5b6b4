from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from enginewright.ground.errors import UnavailableError
from enginewright.ground.runner import device_of
from enginewright.measure import time_all
from enginewright.originals import originals_beside
from enginewright.progress import Progress
from enginewright.recipe import Validation
from enginewright.reports import record, summary
from enginewright.targets.pytorch_engine import EagerRunner
from tests.devices import FakeDevice, FakeRunner

CALL = {"x": np.ones(2, np.float32)}


class Original:
    """At home on the CPU; on a device it takes 4 s, or refuses to go there."""

    def __init__(self, gpu: FakeDevice, *, refuses: str = "") -> None:
        self.gpu, self.refuses = gpu, refuses
        self.asked: list[str] = []

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": -inputs["x"]}

    def as_timed(self, device: str = "cpu") -> Any:
        self.asked.append(device)
        if device == "cpu":
            return self
        if self.refuses:
            raise UnavailableError(self.refuses)
        return FakeRunner(self.gpu, 4.0)


def timed(original: Any, engines: dict[str, Any]) -> dict[str, record.Latency]:
    return time_all(original, engines, CALL, Validation(rounds=30), 0, 1, Progress(quiet=True))


def test_beside_engines_on_the_cpu_the_original_is_what_it_was() -> None:
    original = Original(FakeDevice())
    runners, beside = originals_beside(original, {"a": np.negative, "b": np.negative}, CALL)
    assert runners == {"original": original}
    assert original.asked == ["cpu"]
    assert {(each.device, each.original_device, each.reason) for each in beside.values()} == {("cpu", "cpu", "")}


def test_an_engine_on_a_device_is_timed_beside_the_original_there() -> None:
    gpu = FakeDevice()
    original = Original(gpu)
    found = timed(original, {"engine": FakeRunner(gpu, 1.0)})["engine"]
    assert original.asked == ["cuda:0"]
    assert (found.device, found.original_device, found.copies_timed) == ("cuda:0", "cuda:0", False)
    assert (found.median_s, found.original_median_s, found.ratio) == (1.0, 4.0, 0.25)
    assert found.unsafe == []
    assert summary.devices(found) == "both on cuda:0, inputs on the device"


def test_engines_on_two_devices_have_an_original_each() -> None:
    gpu = FakeDevice()
    runners, beside = originals_beside(Original(gpu), {"here": np.negative, "there": FakeRunner(gpu, 1.0)}, CALL)
    assert {name: device_of(runner) for name, runner in runners.items()} == {
        "original on cpu": "cpu",
        "original on cuda:0": "cuda:0",
    }
    assert [beside[name].original for name in ("here", "there")] == ["original on cpu", "original on cuda:0"]


@pytest.mark.parametrize("known", [True, False])
def test_a_ratio_between_devices_is_said_and_nothing_may_rest_on_it(known: bool) -> None:
    gpu = FakeDevice()
    original: Any = Original(gpu, refuses="no room on it") if known else (lambda inputs: {"y": -inputs["x"]})
    found = timed(original, {"engine": FakeRunner(gpu, 1.0)})["engine"]
    assert (found.device, found.original_device) == ("cuda:0", "cpu")
    why = "no room on it" if known else "the original knows one device alone"
    said = f"the engine ran on cuda:0 and the original on cpu, so the ratio compares devices as well: {why}"
    assert found.unsafe[0] == found.warnings[0] == said
    assert summary.devices(found) == "the engine on cuda:0, inputs on the device; the original on cpu"


def test_an_original_that_fails_on_a_device_stays_at_home() -> None:
    gpu = FakeDevice()

    def fails(array: Any) -> Any:
        raise UnavailableError("a constant of it lies on the CPU")

    class Fails(Original):
        def as_timed(self, device: str = "cpu") -> Any:
            return self if device == "cpu" else FakeRunner(self.gpu, 1.0, fails)

    found = timed(Fails(gpu), {"engine": FakeRunner(gpu, 1.0)})["engine"]
    assert found.original_device == "cpu"
    assert "a constant of it lies on the CPU" in found.unsafe[0]


def test_copies_in_a_time_are_said() -> None:
    gpu = FakeDevice()
    engine = FakeRunner(gpu, 1.0)
    engine.to_device = None
    found = timed(Original(gpu), {"engine": engine})["engine"]
    assert found.copies_timed
    assert summary.devices(found) == "both on cuda:0, copies from and to the host are timed"


@pytest.mark.gpu
def test_on_a_gpu_engine_and_original_are_both_timed_there() -> None:
    module = nn.Linear(64, 64).eval()
    call = {"input": np.ones((4, 64), np.float32)}
    original = EagerRunner(module, threads=1, outputs=["y"])
    engine = EagerRunner(module, threads=1, outputs=["y"], device="cuda:0")
    found = time_all(original, {"engine": engine}, call, Validation(rounds=30), 0, 1, Progress(quiet=True))["engine"]
    assert (found.device, found.original_device, found.copies_timed) == ("cuda:0", "cuda:0", False)
    assert not any("compares devices" in text for text in found.warnings)
    assert module.weight.device.type == "cpu"
