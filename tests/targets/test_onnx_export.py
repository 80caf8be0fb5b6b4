from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.targets.onnx_export import export_onnx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def export(net: nn.Module, path: Path, **more: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.manual_seed(0)
    options = {"dynamic": {"x": {0: ("batch", 1, 8)}}, "outputs": ["y"], "path": path, **more}
    export_onnx(net.eval(), {"x": torch.randn(2, 16)}, **options)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    torch.manual_seed(0)
    net = Net()
    return net, export(net, tmp_path_factory.mktemp("export") / "one" / "model.onnx")


def test_the_same_module_gives_the_same_bytes(exported: tuple[Net, Path]) -> None:
    net, path = exported
    again = export(net, path.parent.parent / "two" / "model.onnx")
    assert again.read_bytes() == path.read_bytes()
    assert again.with_suffix(".safetensors").read_bytes() == path.with_suffix(".safetensors").read_bytes()


def test_nothing_of_this_machine_stays_but_module_names_do(exported: tuple[Net, Path]) -> None:
    _, path = exported
    raw = path.read_bytes()
    for word in (b"site-packages", b".py", str(Path.home()).encode(), str(Path(__file__).parent).encode(), b"+cpu"):
        assert word not in raw, word
    modules = {
        p.value
        for node in onnx.load(path, load_external_data=False).graph.node
        for p in node.metadata_props
        if p.key == "module"
    }
    assert {"inner.0", "inner.2"} <= modules


def test_the_weights_are_a_safetensors_file_that_loads_and_runs_at_other_batch_sizes(
    exported: tuple[Net, Path],
) -> None:
    net, path = exported
    weights = load_file(path.with_suffix(".safetensors"))
    assert torch.equal(weights["inner.0.weight"], net.inner[0].weight) or torch.equal(
        weights["inner.0.weight"].T, net.inner[0].weight
    )
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 5):
        x = np.random.default_rng(0).standard_normal((batch, 16), dtype=np.float32)
        np.testing.assert_allclose(
            session.run(None, {"x": x})[0], net(torch.from_numpy(x)).detach(), rtol=1e-5, atol=1e-6
        )
    assert session.get_inputs()[0].shape == ["batch", 16]
    assert session.get_outputs()[0].name == "y"


def test_a_branch_on_data_is_one_clear_error(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ToolchainError, match=r"could not be exported to ONNX: .{10,}"):
        export(Branch(), tmp_path / "model.onnx")


def test_an_opset_the_exporter_cannot_write_is_an_error_not_a_log_line(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="opset 11"):
        export(Net(), tmp_path / "model.onnx", opset=11)


class Squeezing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(1) + x[:, :1].squeeze(1)[:, None]


def test_squeezing_a_dimension_that_is_not_one_leaves_it(tmp_path: Path) -> None:
    path = export(Squeezing(), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((3, 16), dtype=np.float32)
    (y,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(y, x + x[:, :1])


class Cropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (2 - x.shape[0]) // 2


def test_sizes_are_rounded_down_even_below_zero(tmp_path: Path) -> None:
    path = export(Cropping(), tmp_path / "model.onnx")
    for batch, first in ((1, 0), (2, 0), (3, -1), (4, -1), (5, -2)):
        (y,) = onnxruntime.InferenceSession(path).run(None, {"x": np.zeros((batch, 16), dtype=np.float32)})
        assert (y == first).all()


class Freezing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1) * torch.ones(2, 16)


def test_a_dimension_that_came_out_fixed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="fixed dimension 'batch' of 'x' at 2"):
        export(Freezing(), tmp_path / "model.onnx")
