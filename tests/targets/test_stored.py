from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from enginewright.ground.errors import ToolchainError
from enginewright.targets import stored

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.tensor([-1, 7], dtype=torch.int8),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def rewritten(path: Path, change: object) -> Path:
    """The same bytes under a changed header."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return path


def test_tensors_are_those_of_the_file(path: Path) -> None:
    found = stored.read(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_the_place_of_a_tensor_holds_its_bytes(path: Path) -> None:
    found = stored.read(path)
    for name in "abc":
        place = stored.place_of(found[name])
        assert place is not None
        assert place.path == path
        raw = path.read_bytes()[place.offset : place.offset + place.bytes]
        assert raw == TENSORS[name].view(torch.uint8).numpy().tobytes()


def test_a_view_a_transpose_and_a_copy_are_told_apart(path: Path) -> None:
    a = stored.read(path)["a"]
    row = stored.place_of(a[1])
    whole = stored.place_of(a)
    assert row is not None
    assert whole is not None
    assert (row.offset - whole.offset, row.bytes) == (12, 12)
    assert stored.place_of(a.T) is None
    assert stored.place_of(a.clone()) is None
    assert stored.place_of(torch.nn.Parameter(a)) == whole


def test_a_map_that_is_gone_is_forgotten(path: Path) -> None:
    before = len(stored._mapped)
    found = stored.read(path)
    assert len(stored._mapped) == before + 1
    del found
    assert len(stored._mapped) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(data_offsets=[0, 4000]), "'a' contradicts itself"),
        (lambda h: h["a"].update(shape=[2, 4]), "'a' contradicts itself"),
        (lambda h: h["a"].update(shape=[-2, -3]), "'a' contradicts itself"),
        (lambda h: h["a"].update(shape=[1000], data_offsets=[0, 4000]), "cut short: 'a' ends at byte"),
        (lambda h: h["a"].update(dtype="C64"), "the entry of 'a' cannot be read"),
        (lambda h: h["a"].pop("data_offsets"), "the entry of 'a' cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(path: Path, change: object, message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        stored.read(rewritten(path, change))


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, (4).to_bytes(8, "little") + b"[12]" + b"0" * 9])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ToolchainError, match=r"w\.safetensors is not a whole safetensors file"):
        stored.read(tmp_path / "w.safetensors")
