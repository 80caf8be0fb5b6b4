from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.ground.signature import Dim
from enginewright.opened import open_subject
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import draw


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 3)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.table(ids) + x


def test_a_bare_onnx_file_brings_its_own_input_contract(tmp_path: Path) -> None:
    example = {"ids": torch.zeros(2, dtype=torch.int64), "x": torch.zeros(2, 3)}
    dynamic = {"ids": {0: ("batch", 1, 8)}, "x": {0: ("batch", 1, 8)}}
    export_onnx(Lookup().eval(), example, dynamic=dynamic, outputs=["y"], path=tmp_path / "m.onnx")
    opened = open_subject(str(tmp_path / "m.onnx"), threads=1)
    ids, x = opened.inputs
    assert isinstance(ids.shape[0], Dim)
    assert (ids.dtype, ids.low, ids.high) == ("int64", 0, 2)
    assert (x.dtype, x.low, x.shape[1]) == ("float32", None, 3)
    assert opened.runners["m.onnx"](draw(opened.inputs, seed=0))["y"].shape == (2, 3)


def test_one_engine_of_an_artifact_can_be_named(artifact: Path) -> None:
    assert list(open_subject(f"{artifact}#onnxruntime").runners) == ["onnxruntime"]
    with pytest.raises(ToolchainError, match=r"no engine 'onnxruntim'; it has onnxruntime, tensorrt"):
        open_subject(f"{artifact}#onnxruntim")
    with pytest.raises(UnavailableError, match=r"tensorrt: (it was not built|not)"):
        open_subject(f"{artifact}#tensorrt")


def test_a_damaged_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ToolchainError, match=r"model\.safetensors was changed"):
        open_subject(str(copy))


def test_a_model_string_runs_eagerly_and_is_its_own_original() -> None:
    opened = open_subject("dit:tiny", threads=1)
    assert opened.runners["dit:tiny"] is opened.original
