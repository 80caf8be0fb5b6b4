"""Tensors on an accelerator and its clock: PyTorch holds the memory, and other runtimes share it over DLPack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginewright.ground.runner import CPU, Clock
from enginewright.ground.signature import Arrays
from enginewright.targets import machine
from enginewright.targets.contract import Answer

CUDA = "cuda:0"
"""The GPU that engines run on."""


def has_cuda() -> Answer:
    """Whether PyTorch can hold tensors on a GPU here."""
    if not (found := machine.gpu()).yes:
        return found
    return Answer(True) if torch.cuda.is_available() else Answer(False, "this PyTorch was built without CUDA")


def clock_on(device: str) -> Clock:
    """The clock of a device; on a GPU a reading waits for all its streams, those of other runtimes among them."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def tensors_on(device: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays or tensors as tensors on a device, whole before this returns; what is there already stays as it is."""
    placed = {name: tensor_of(value).to(device) for name, value in inputs.items()}
    written(device)
    return placed


def tensor_of(value: Any) -> Tensor:
    """An array as a tensor around the same memory; a tensor as it is."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def written(device: str) -> None:
    """Wait until PyTorch has written what a runtime with streams of its own is to read."""
    if device.startswith("cuda"):
        torch.cuda.current_stream(device).synchronize()


def on_host(values: Mapping[str, Tensor]) -> Arrays:
    """Tensors as arrays; those on an accelerator are copied, once what gives them is done."""
    return {name: (value if value.device.type == CPU else value.cpu()).numpy() for name, value in values.items()}


def holds_tensors(values: Mapping[str, Any]) -> bool:
    """Whether a call brings tensors, and is answered with tensors."""
    return any(isinstance(value, Tensor) for value in values.values())
