from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from enginewright import scratch
from enginewright.scratch import Scratch
from enginewright.targets import stored


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    monkeypatch.setattr(scratch, "SMALLEST", 1024)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    net[0].register_buffer("table", torch.arange(4096, dtype=torch.int8))
    return net


def test_large_tensors_move_to_disk_and_nothing_else_changes(layer: nn.Sequential, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 64)
    wanted = layer(x)
    Scratch(tmp_path).offload(layer)
    after = layer.state_dict()
    moved = {name for name, tensor in after.items() if tensor.data_ptr() != addresses[name]}
    assert moved == {"0.weight", "0.table"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(layer(x), wanted)
    assert isinstance(layer[0].weight, nn.Parameter)
    assert list(tmp_path.iterdir()) == [], "the file must be gone from the folder already"


def test_what_passed_through_scratch_is_no_place_to_point_at(layer: nn.Sequential, tmp_path: Path) -> None:
    Scratch(tmp_path).offload(layer)
    assert stored.place_of(layer[0].weight) is None


def test_a_full_disk_is_an_error_of_the_disk(
    layer: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(scratch, "save_file", full)
    with pytest.raises(OSError, match="no space left") as caught:
        Scratch(tmp_path).offload(layer)
    assert caught.value.errno == errno.ENOSPC
