"""Dimensions keep their declared range through the exporter, or an error says what is left of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.targets.onnx_export import export_onnx


class Calls(nn.Module):
    """A module that does what a function says."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def export(module: nn.Module, path: Path, inputs: dict[str, Tensor], dynamic: Any) -> onnxruntime.InferenceSession:
    export_onnx(module.eval(), inputs, dynamic=dynamic, outputs=["y"], path=path / "m.onnx")
    return onnxruntime.InferenceSession(path / "m.onnx", providers=["CPUExecutionProvider"])


def branch(x: Tensor) -> Tensor:
    a = x + 1
    if x.shape[1] > 8:
        a = a * 2
    return a


def test_a_branch_on_a_size_names_dimension_bound_line_and_declaration(tmp_path: Path) -> None:
    dynamic = {"x": {0: ("batch", 1, 8), 1: ("time", 2, 40)}}
    with pytest.raises(ToolchainError) as caught:
        export(Calls(branch), tmp_path, {"x": torch.randn(2, 12)}, dynamic)
    error = caught.value
    assert "'time'" in error.message
    assert "declared from 2 to 40" in error.message
    assert "9 to 40 only" in error.message
    assert str(error.where).startswith("x.shape[1] > 8 at test_dimensions.py:")
    assert "declare time from 9 to 40, as {1: ('time', 9, 40)}" in str(error.help)


def test_the_declaration_that_the_error_asks_for_exports(tmp_path: Path) -> None:
    session = export(Calls(branch), tmp_path, {"x": torch.randn(2, 12)}, {"x": {1: ("time", 9, 40)}})
    x = torch.randn(2, 9)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), branch(x))


def test_a_size_that_the_model_fixes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"must be 8 here|fixed dimension 'rows'"):
        export(Calls(lambda x: x @ x), tmp_path, {"x": torch.randn(8, 8)}, {"x": {0: ("rows", 1, 16)}})


class Patches(nn.Module):
    """Four frames make a token."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, frames: Tensor) -> Tensor:
        batch, time, width = frames.shape
        return self.head(frames.reshape(batch, time // 4, 4 * width))


@pytest.mark.parametrize("example", [4, 12], ids=["smallest", "middle"])
def test_sizes_in_multiples_work_from_the_smallest_to_the_largest(example: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Patches().eval()
    dynamic = {"frames": {0: ("batch", 1, 8), 1: ("time", 4, 64, 4)}}
    session = export(module, tmp_path, {"frames": torch.randn(2, example, 16)}, dynamic)
    assert [dim.dim_param for dim in onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "time",
        "",
    ]
    for time in (4, 8, 20, 64):
        frames = torch.randn(1, time, 16)
        found = torch.from_numpy(session.run(None, {"frames": frames.numpy()})[0])
        torch.testing.assert_close(found, module(frames).detach(), atol=1e-5, rtol=1e-5)


class Modulates(nn.Module):
    """Rows of one input take a scale and a shift made from another, in a view of the first one's batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        made = (t[:, None] * torch.ones(16)).reshape(x.shape[0], -1, 2, 8)
        shift, scale = made.unbind(2)
        return x * (1 + scale) + shift


def test_inputs_with_one_batch_may_be_mixed_in_a_view(tmp_path: Path) -> None:
    batch = ("batch", 1, 8)
    inputs = {"x": torch.randn(2, 6, 8), "t": torch.randn(2)}
    session = export(Modulates(), tmp_path, inputs, {"x": {0: batch, 1: ("time", 2, 40)}, "t": {0: batch}})
    for rows in (1, 3):
        x, t = torch.randn(rows, 5, 8), torch.randn(rows)
        found = torch.from_numpy(session.run(None, {"x": x.numpy(), "t": t.numpy()})[0])
        torch.testing.assert_close(found, Modulates()(x, t))


def test_a_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = Calls(lambda x: {"y": x + 1, "note": 3.0})
    export(module, tmp_path, {"x": torch.randn(2, 12)}, {"x": {0: ("batch", 1, 8)}})
    assert not module._forward_pre_hooks
    assert not module._forward_hooks
    assert "forward" not in vars(module)
    assert isinstance(module(torch.ones(1)), dict)
