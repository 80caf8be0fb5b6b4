"""What the exporter refuses is said in words; what a module returns beside tensors is left out."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.targets.exporter_errors import reasons, refusal
from enginewright.targets.onnx_export import export_onnx

ROWS = {"x": {0: ("batch", 1, 8)}}


class Keywords(nn.Module):
    def forward(self, **tensors: Tensor) -> Tensor:
        return tensors["x"] * 2


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x * 2, None, 3.0, "text"


@dataclasses.dataclass
class Answer:
    first: Tensor
    note: str
    second: Tensor


class Dataclass(nn.Module):
    def forward(self, x: Tensor) -> Answer:
        return Answer(x * 2, "note", x + 1)


class Value(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def export(module: nn.Module, path: Path, outputs: list[str]) -> onnx.ModelProto:
    export_onnx(module.eval(), {"x": torch.randn(4, 8)}, dynamic=ROWS, outputs=outputs, path=path / "m.onnx")
    return onnx.load(path / "m.onnx")


@pytest.mark.parametrize(
    ("module", "outputs"), [(Keywords(), ["y"]), (Mixed(), ["y"]), (Dataclass(), ["first", "second"])]
)
def test_the_tensors_come_out(module: nn.Module, outputs: list[str], tmp_path: Path) -> None:
    graph = export(module, tmp_path, outputs).graph
    assert [value.name for value in graph.output] == outputs
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def refused(module: nn.Module, path: Path, capfd: pytest.CaptureFixture[str]) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        export(module, path, ["y"])
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "GraphModule" not in said.out + said.err
    return caught.value


def test_a_branch_on_a_value_names_its_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = refused(Value(), tmp_path, capfd)
    assert "depends on a value" in error.message
    assert str(error.where).startswith("test_exporter_errors.py:")
    assert str(error.where).endswith("in forward: if x.sum() > 0:")
    assert "torch.where" in str(error.help)


def test_an_operator_without_translation_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "operator prims.bessel_j0 has no translation" in refused(Unknown(), tmp_path, capfd).message


def chained(*errors: Exception) -> Exception:
    for outer, inner in itertools.pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


def test_the_reason_is_found_behind_several_links() -> None:
    error = refusal(
        chained(RuntimeError("Failed to export."), RuntimeError("\nat node f"), ValueError("no such table"))
    )
    assert error.message.endswith(": at node f: no such table")


def test_complex_numbers_are_named_with_a_way_round() -> None:
    text = "No ONNX function found for <OpOverload(op='aten.polar', overload='default')>. No decomposition: complex64"
    error = refusal(chained(RuntimeError("Failed to convert."), RuntimeError(text)))
    assert "operator aten.polar" in error.message
    assert "cosines and sines" in str(error.help)


def test_a_returned_object_is_named_with_what_to_return() -> None:
    error = refusal(RuntimeError("Found <class 'transformers.cache_utils.DynamicCache'> in output, which is not known"))
    assert "returns a DynamicCache" in error.message
    assert "use_cache=False" in str(error.help)


def test_a_text_that_another_holds_is_said_once() -> None:
    assert reasons(["a: b", "b"]) == ["a: b"]
