"""One device, or several processes that share a step's calls."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.passes.contract import Context
from enginewright.passes.recovery.devices import Devices
from enginewright.passes.recovery.distill import Distill

CALLS = [{"x": torch.tensor([float(i)])} for i in range(5)]


def test_one_device_has_all_calls_and_its_own_gradients() -> None:
    devices = Devices("cpu")
    assert [float(call["x"]) for call in devices.own(CALLS)] == [0, 1, 2, 3, 4]
    assert float(devices.mean([torch.tensor(3.0)])[0]) == 3


def test_processes_share_calls_and_average_gradients(monkeypatch) -> None:
    class Accelerator:
        """The second of two processes; the first has gradients of 1."""

        device, process_index, num_processes = torch.device("cpu"), 1, 2

        def __init__(self, *, cpu: bool) -> None:
            assert cpu

        def reduce(self, tensor: torch.Tensor, *, reduction: str) -> torch.Tensor:
            assert reduction == "mean"
            return (tensor + 1) / 2

    state = SimpleNamespace(AcceleratorState=SimpleNamespace(_shared_state={}))
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(Accelerator=Accelerator, state=state))
    alone = Devices("cpu")
    assert [float(call["x"]) for call in alone.own(CALLS)] == [0, 1, 2, 3, 4]
    assert float(alone.mean([torch.tensor(3.0)])[0]) == 3
    devices = Devices("cpu", share=True)
    assert [float(call["x"]) for call in devices.own(CALLS)] == [1, 3]
    assert float(devices.mean([torch.tensor(3.0)])[0]) == 2
    assert devices.number == 1

    context = Context(calibration=[{"input": torch.ones(1, 2)}], original=nn.Linear(2, 2))
    with pytest.raises(ToolchainError, match="batch is 1; 2 processes need a call each"):
        Distill(accelerate=True, batch=1).plan(nn.Linear(2, 2), context)


def test_accelerate_is_asked_for_by_name_where_it_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnavailableError, match="'accelerate', which could not be imported") as caught:
        Devices("cpu")
    assert "enginewright[accelerate]" in caught.value.help


class Known:
    """accelerate's state, as an earlier step left it on a GPU."""

    _shared_state: ClassVar = {"device": "cuda"}
    resets: ClassVar[list[bool]] = []
    device, num_processes = torch.device("cuda"), 1

    @classmethod
    def _reset_state(cls, *, reset_partial_state: bool) -> None:
        cls.resets.append(reset_partial_state)


def test_a_step_may_train_on_another_device_than_the_one_before(monkeypatch) -> None:
    made = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
    accelerate = SimpleNamespace(Accelerator=lambda cpu: made, state=SimpleNamespace(AcceleratorState=Known))
    monkeypatch.setitem(sys.modules, "accelerate", accelerate)
    assert Devices("cpu").device.type == "cpu"
    assert Known.resets == [True]
    monkeypatch.setattr(Known, "num_processes", 2)
    with pytest.raises(UnavailableError, match="2 processes train on cuda already, not cpu"):
        Devices("cpu")
