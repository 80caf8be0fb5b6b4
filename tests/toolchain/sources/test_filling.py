from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.sources.filling import fill, on_meta, read_all, shards, without_memory
from enginewright.targets import stored


class Net(nn.Module):
    """A tied head, a computed buffer and a stored one."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x)) + self.table)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = Net().state_dict()
    del state["head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_module_without_memory_is_filled_from_disk(path: Path) -> None:
    with without_memory():
        net = Net()
    assert on_meta(net) == ["embed.weight", "norm.weight", "norm.bias"]
    assert torch.equal(net.table, torch.arange(4.0))
    fill(net, stored.read(path), where=path)
    assert not on_meta(net)
    assert net.head.weight is net.embed.weight
    assert stored.place_of(net.embed.weight) is not None
    torch.manual_seed(0)
    x = torch.tensor([1, 6])
    assert torch.equal(net.eval()(x), Net().eval()(x))


def test_outside_the_block_modules_are_real_again() -> None:
    with pytest.raises(RuntimeError, match="broken"), without_memory():
        raise RuntimeError("broken")
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_every_tensor_that_does_not_fit_is_counted(path: Path) -> None:
    tensors = stored.read(path)
    del tensors["norm.bias"]
    tensors["stranger"] = torch.ones(1)
    tensors["norm.weight"] = torch.ones(5)
    with pytest.raises(ToolchainError) as caught:
        fill(Net(), tensors, where=path)
    assert caught.value.message == (
        "model.safetensors does not fit the model (3 tensors): "
        "missing norm.bias; norm.weight is (5,), the model has (4,); unknown stranger"
    )


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1), "c": torch.zeros(2)}, tmp_path / "m-1.safetensors")
    with pytest.raises(ToolchainError, match=r"1 of 2 shards are missing: m-2\.safetensors"):
        shards(tmp_path, "m")
    save_file({"b": torch.ones(3)}, tmp_path / "m-2.safetensors")
    assert read_all(shards(tmp_path, "m")).keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "../x.safetensors"}}', "points outside its folder"),
        ('{"weight_map": 3}', "cannot be read as an index"),
        ("{", "cannot be read as an index"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(ToolchainError, match=message):
        shards(tmp_path, "m")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(ToolchainError, match="no safetensors weights") as caught:
        shards(tmp_path, "m")
    assert "pickles" in str(caught.value)
