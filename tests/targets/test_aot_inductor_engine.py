from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import enginewright
from enginewright import pipeline
from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.passes.contract import Context
from enginewright.passes.quantization.linear import QuantizedLinear
from enginewright.passes.quantization.quantize_weights import QuantizeWeights
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.targets import aot_inductor_engine
from enginewright.targets.aot_inductor_engine import AotInductor, PackageRunner, refuse_other
from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.exported_program import export_program

AXES = {"x": {0: ("batch", 1, 8)}, "scale": {0: ("batch", 1, 8)}}
RANGES = {"x": ShapeRange((1, 16), (4, 16), (8, 16)), "scale": ShapeRange((1,), (4,), (8,))}


class Net(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32) if layer is None else layer

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.first(x) * scale[:, None]
        return {"y": y, "sums": y.sum(1)}


def call(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {"x": rng.standard_normal((rows, 16), np.float32), "scale": rng.standard_normal(rows, np.float32)}


def graph_of(net: nn.Module, path: Path) -> Graph:
    """Beside the program a graph that holds the names of the outputs alone."""
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "sums")]
    onnx.save(helper.make_model(helper.make_graph([], "names", [], outputs)), path)
    example = {name: torch.from_numpy(array) for name, array in call(2).items()}
    return Graph(path=path, ranges=RANGES, program=lambda: export_program(net.eval(), example, dynamic=AXES))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    """Really compiled; about 6 s where PyTorch has compiled its headers before, twice that where not."""
    if not AotInductor().availability().buildable.yes:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    net, folder = Net(), tmp_path_factory.mktemp("built")
    (folder / "engine").mkdir()
    AotInductor().build(graph_of(net, folder / "model.onnx"), folder / "engine")
    return net, folder / "engine"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_compiled_package_computes_what_the_module_does_at_every_size(built: tuple[Net, Path]) -> None:
    net, folder = built
    runner = AotInductor().load(folder, threads=1, module=lambda: net)
    for rows in (1, 3, 8):
        given = call(rows)
        tensors = {name: torch.from_numpy(array) for name, array in given.items()}
        found, wanted = runner(given), net(**tensors)
        assert list(found) == ["y", "sums"]
        for name, array in found.items():
            np.testing.assert_allclose(array, wanted[name].detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.from_numpy(found["y"]), runner(tensors)["y"])
    assert torch.get_num_threads() == 1


def test_what_it_was_not_compiled_for_is_refused_before_it_is_read(built: tuple[Net, Path]) -> None:
    runner = AotInductor().load(built[1], threads=torch.get_num_threads(), module=nn.Module)
    with pytest.raises(ToolchainError, match=r"'x' has shape \(9, 16\); it was compiled for \(1 to 8, 16\)"):
        runner({**call(9), "scale": call(3)["scale"]})
    with pytest.raises(ToolchainError, match=r"'scale' has shape \(3,\)"):
        runner({**call(2), "scale": call(3)["scale"]})
    with pytest.raises(ToolchainError, match=r"'x' has shape \(2, 17\)"):
        runner({**call(2), "x": np.zeros((2, 17), np.float32)})
    with pytest.raises(ToolchainError, match="'x' is float64; it was compiled for float32"):
        runner({**call(2), "x": np.zeros((2, 16))})
    with pytest.raises(ToolchainError, match="'scale' is missing"):
        runner({"x": call(2)["x"]})


def test_a_package_holds_no_source_and_says_what_it_needs(built: tuple[Net, Path]) -> None:
    _, folder = built
    assert sorted(path.name for path in folder.iterdir()) == ["engine.pt2", "signature.json"]
    names = zipfile.ZipFile(folder / "engine.pt2").namelist()
    assert any(name.endswith(".so") for name in names)
    assert not any(name.endswith((".cpp", ".h")) for name in names)
    said = json.loads((folder / "signature.json").read_text())
    symbol = said["inputs"]["scale"]["shape"][0][0]
    assert said["inputs"]["x"] == {"dtype": "float32", "shape": [[symbol, 1, 8], 16]}
    assert torch.__version__.startswith(said["torch"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0.0"}, "compiled for PyTorch 1.0.0; this is 2"),
        ({"instructions": ["avx9000"]}, "compiled for a processor that has avx9000"),
    ],
)
def test_a_package_that_could_crash_here_is_not_loaded(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"torch": torch.__version__.partition("+")[0], "instructions": [], "inputs": {}, "outputs": []}
    (tmp_path / "signature.json").write_text(json.dumps(said | change))
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: pytest.fail("it was loaded"))
    with pytest.raises(UnavailableError, match=message):
        AotInductor().load(tmp_path, threads=1, module=nn.Module)
    refuse_other(torch.__version__.partition("+")[0], aot_inductor_engine.instructions())


def test_without_a_compiler_it_cannot_be_built_but_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    able = AotInductor().availability()
    assert able.why_not("buildable") == "not buildable: no C++ compiler 'no-such-compiler'; install it, or set CXX"
    assert able.runnable.yes


def test_a_network_without_a_program_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="there is none of this network") as caught:
        AotInductor().build(Graph(path=tmp_path / "m.onnx", ranges={}), tmp_path)
    assert "hoist_constants" in str(caught.value.help)


def test_what_the_compiler_says_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **more: Any) -> None:
        raise RuntimeError("C++ compile error\n\nCommand: g++ ...")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    (tmp_path / "engine").mkdir()
    with pytest.raises(ToolchainError, match=r"AOTInductor cannot compile it: C\+\+ compile error$"):
        AotInductor().build(graph_of(Net(), tmp_path / "m.onnx"), tmp_path / "engine")


def test_a_package_of_one_output_gives_it_by_its_name() -> None:
    runner = PackageRunner(
        lambda x: -x, {"x": {"dtype": "float32", "shape": [2]}}, ["y"], threads=torch.get_num_threads()
    )
    assert runner({"x": np.ones(2, np.float32)})["y"].tolist() == [-1, -1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.usefixtures("threads")
def test_layers_that_passes_quantized_compute_the_same_compiled(bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = Net(nn.Linear(16, 32)).eval()
    if bits == "int8":
        net.first = QuantizedLinear(net.first, 4 / 127)
    else:
        net = QuantizeWeights(weights="int4", block=16, smallest=0).apply(net, Context()).model
    (tmp_path / "engine").mkdir()
    AotInductor().build(graph_of(net, tmp_path / "m.onnx"), tmp_path / "engine")
    given = call(4)
    found = AotInductor().load(tmp_path / "engine", threads=1, module=lambda: net)(given)
    wanted = net(**{name: torch.from_numpy(array) for name, array in given.items()})
    np.testing.assert_allclose(found["y"], wanted["y"].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_artifact_says_how_to_run_the_package_with_pytorch_alone(tmp_path: Path) -> None:
    targets = [{"target": "aot_inductor"}, {"target": "onnxruntime"}]
    content = {"model": "transformer_programs:tiny", "targets": targets, "validation": {"rounds": 3, "calls": 2}}
    out = tmp_path / "out"
    _, code = pipeline.export(make(content), out, force=False, progress=Progress(quiet=True))
    assert code == 0
    report = record.read(out / "report.json")
    assert [output.relative_l2 < 1e-5 for target in report.targets for output in target.fidelity] == [True, True]
    assert report.targets[0].sizes
    text = (out / "README.md").read_text()
    section = text[text.index("## aot_inductor") : text.index("## onnxruntime")]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (lines,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    subprocess.run(["sh", "-ec", commands.replace("DEST", str(tmp_path / "there"))], cwd=out, check=True)
    run = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path / "there", capture_output=True, text=True, check=True
    )
    assert run.stdout == "logits torch.float32 (1, 6, 3)\n"
    call = {"ids": np.ones((2, 6), np.int64)}
    given = [enginewright.load(out, name, trust_code=True)(**call) for name in ("aot_inductor", "onnxruntime")]
    np.testing.assert_allclose(*given, rtol=1e-5, atol=1e-5)
