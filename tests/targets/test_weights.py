"""Weights that were on disk: copied once, or linked where they are large or the user says so."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8
from enginewright.targets import stored, weights
from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnx_files import all_tensors
from enginewright.targets.onnxruntime_engine import OnnxRuntime
from enginewright.targets.weights import Range, settle_weights

X = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64)).eval()


def checkpoint(folder: Path, extra: int = 0) -> nn.Sequential:
    """A network whose weights are mapped from ``w.safetensors``, which may hold more."""
    folder.mkdir()
    more = {"unread": torch.ones(extra), "half": torch.ones(7, dtype=torch.float16)} if extra else {}
    save_file({**net().state_dict(), **more}, folder / "w.safetensors")
    found = net()
    kept = stored.read(folder / "w.safetensors")
    found.load_state_dict({name: kept[name] for name in found.state_dict()}, assign=True)
    return found


def export(module: nn.Module, folder: Path, name: str = "model") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.onnx"
    export_onnx(module, {"input": X}, dynamic={"input": {0: ("batch", 1, 8)}}, outputs=["y"], path=path)
    return path


Linked = Callable[..., Path]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One export of a file that holds just the weights, and one of a file that holds much more."""
    folders = {extra: tmp_path_factory.mktemp("exports") for extra in (0, 100_000)}
    for extra, folder in folders.items():
        export(checkpoint(folder / "src", extra), folder / "out")
    return folders


@pytest.fixture
def linked(exports: dict[int, Path], tmp_path: Path) -> Linked:
    """A fresh export whose weights are linked to ``src/w.safetensors``; gives the graph's path."""

    def make(name: str = "out", extra: int = 0) -> Path:
        source, out = tmp_path / "src" / "w.safetensors", tmp_path / name
        source.parent.mkdir(exist_ok=True)
        (out / "weights").mkdir(parents=True)
        if not source.exists():
            shutil.copy(exports[extra] / "src" / "w.safetensors", source)
        os.link(source, out / "weights" / "w.safetensors")
        shutil.copy(exports[extra] / "out" / "model.onnx", out)
        return out / "model.onnx"

    return make


WANTED = net()(X).detach()


def run(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"input": X.numpy()})[0]


def names_on_disk(folder: Path) -> set[int]:
    return {path.stat().st_nlink for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("extra", [0, 100_000], ids=["most of the file", "little of the file"])
def test_what_graphs_read_is_copied_once_and_the_checker_takes_it(linked: Linked, tmp_path: Path, extra: int) -> None:
    path = linked(extra=extra)
    source, again = tmp_path / "src" / "w.safetensors", path.with_name("second.onnx")
    shutil.copy(path, again)
    assert settle_weights(tmp_path / "out", "auto") == (False, "")
    copy = tmp_path / "out" / "weights" / "w.safetensors"
    assert names_on_disk(tmp_path / "out") == {1}
    assert (copy.stat().st_size < source.stat().st_size) == bool(extra)
    source.write_bytes(bytes(source.stat().st_size))  # saved over in place
    for file in (path, again):
        onnx.checker.check_model(file)
        np.testing.assert_allclose(run(file), WANTED, atol=1e-6)
    kept = load_file(copy)
    assert "unread" not in kept
    assert torch.equal(kept["0.weight"], net()[0].weight)  # type: ignore[arg-type]
    assert sorted(p.name for p in copy.parent.iterdir()) == ["w.safetensors"]
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    onnx.checker.check_model(tmp_path / "moved" / "model.onnx")


def test_a_copy_is_the_same_whatever_the_kernel_can_do(
    linked: Linked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_kernel, by_hand = linked("one", 100_000), linked("two", 100_000)
    settle_weights(tmp_path / "one", "copy")

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(weights, "PIECE", 1000)
    settle_weights(tmp_path / "two", "copy")
    for name in ("model.onnx", "weights/w.safetensors"):
        assert (by_kernel.parent / name).read_bytes() == (by_hand.parent / name).read_bytes()


def test_views_of_a_tensor_take_the_tensor_along(tmp_path: Path) -> None:
    """As query, key and value in one matrix, of which each graph reads a third."""
    folder = tmp_path / "out"
    folder.mkdir()
    save_file({"a": torch.ones(5000), "qkv": torch.arange(3000.0), "z": torch.ones(1)}, tmp_path / "w.safetensors")
    qkv = stored.read(tmp_path / "w.safetensors")["qkv"]

    class Third(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Parameter(qkv[1000:2000], requires_grad=False)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input[:, :1] * self.part

    path = export(Third(), folder)
    settle_weights(folder, "copy")
    assert list(load_file(folder / "weights" / "w.safetensors")) == ["qkv"]
    np.testing.assert_allclose(run(path), X[:, :1] * torch.arange(1000.0, 2000.0), rtol=1e-6)
    assert weights.parts_read(tmp_path / "w.safetensors", {Range(0, 30_000)}) is None


def test_weights_of_a_large_checkpoint_are_linked_and_that_is_said(
    linked: Linked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = linked()
    monkeypatch.setattr(weights, "COPIED_UP_TO", 1000)
    stays, said = settle_weights(tmp_path / "out", "auto")
    assert stays
    assert "of weights are linked, not copied" in said
    assert "--weights copy" in said
    assert (tmp_path / "out" / "weights" / "w.safetensors").samefile(tmp_path / "src" / "w.safetensors")
    np.testing.assert_allclose(run(path), WANTED, atol=1e-6)
    assert settle_weights(tmp_path / "out", "copy") == (False, "")
    onnx.checker.check_model(path)


def test_small_weights_are_linked_where_the_user_says_so(linked: Linked, tmp_path: Path) -> None:
    linked()
    assert settle_weights(tmp_path / "out", "link")[0]
    assert names_on_disk(tmp_path / "out" / "weights") == {2}


def test_another_program_s_weights_are_copied_whole(linked: Linked, tmp_path: Path) -> None:
    path = linked()
    raw = tmp_path / "raw.bin"
    found = tmp_path / "out" / "weights" / "w.safetensors"
    raw.write_bytes(b"\xff" * 8 + found.read_bytes()[8:])
    found.unlink()
    os.link(raw, found)
    settle_weights(tmp_path / "out", "copy")
    assert not found.samefile(raw)
    assert found.read_bytes() == raw.read_bytes()
    onnx.checker.check_model(path)


def test_linked_files_that_no_graph_reads_are_not_kept(linked: Linked) -> None:
    path = linked()
    path.unlink()
    settle_weights(path.parent, "link")
    assert list(path.parent.iterdir()) == []


def test_copying_holds_nothing_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    size = 300 << 20
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights.copy_ranges(tmp_path / "large", tmp_path / "copy", [Range(0, size)], b"")
    assert (tmp_path / "copy").stat().st_size == size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    with pytest.raises(ToolchainError, match="became shorter"):
        weights.copy_ranges(tmp_path / "a", tmp_path / "b", [Range(0, 20)], b"")


class Halved(nn.Module):
    """Two layers, of which a pass for linear layers changes one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 128)
        self.table = nn.Parameter(torch.randn(128, 32))
        self.other = nn.Parameter(torch.randn(200, 200))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(input)) @ self.table


@pytest.mark.parametrize("links", [False, True])
def test_an_engine_holds_only_the_weights_that_it_reads(tmp_path: Path, links: bool) -> None:
    """A graph of the engine's own reads one tensor of the checkpoint: the rest stays out of its folder."""
    torch.manual_seed(0)
    save_file(Halved().state_dict(), tmp_path / "w.safetensors")
    module = Halved().eval()
    module.load_state_dict(stored.read(tmp_path / "w.safetensors"), assign=True)
    quantized = QuantizeInt8().apply(module, Context(calibration=[{"input": X}], example={"input": X})).model
    out = tmp_path / "out"
    path = export(quantized, out)
    settle_weights(out, "link" if links else "copy")
    engine = out / "engines" / "onnxruntime"
    engine.mkdir(parents=True)
    ranges = {"input": ShapeRange((1, 64), (2, 64), (8, 64))}
    graph = Graph(path=path, ranges=ranges, examples=[{"input": X.numpy()}], links=links)
    built = OnnxRuntime(int8="dynamic").build(graph, engine)
    assert json.loads((engine / "engine.json").read_text())["graph"] == "dynamic.onnx"
    assert built.reads == ()
    own = {p.relative_to(engine).as_posix() for p in engine.rglob("*") if p.is_file()}
    files = {"engine.json", "dynamic.onnx", "dynamic.safetensors"}
    assert own == (files | {"weights/w.safetensors"} if links else files)
    if not links:
        onnx.checker.check_model(engine / "dynamic.onnx")
        assert names_on_disk(out) == {1}
        kept = load_file(engine / "dynamic.safetensors")
        assert [name for name, t in kept.items() if t.dtype == torch.float32 and t.shape == (128, 32)]
        assert not any(t.shape == (200, 200) for t in kept.values())
        tensors = all_tensors(onnx.load(engine / "dynamic.onnx", load_external_data=False))
        read = sum(int(e.value) for t in tensors for e in t.external_data if e.key == "length")
        assert sum(t.nbytes for t in kept.values()) == read
    found = OnnxRuntime().load(engine, threads=1)({"input": X.numpy()})["y"]
    np.testing.assert_allclose(found, quantized(X).detach(), atol=0.2)


def test_linked_data_of_a_graph_that_comes_in_is_accepted(linked: Linked) -> None:
    """As our own artifact with links, or a hub's folder of links is."""
    path = linked()
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(path)
    weights.check(path)
    graph = ir.load(path)
    graph.graph.node(0).op_type = "NoSuchOperator"
    ir.save(graph, path)
    with pytest.raises(onnx.checker.ValidationError, match="NoSuchOperator"):
        weights.check(path)


@pytest.mark.parametrize("kind", ["hard link", "symbolic link"])
def test_a_linked_graph_is_read_and_run(linked: Linked, kind: str) -> None:
    path = linked()
    if kind == "symbolic link":
        found = path.parent / "weights" / "w.safetensors"
        found.rename(path.parent / "blob")
        found.symlink_to("../blob")
    model = sources.load(f"onnx:{path}")
    (found,) = (
        value.const_value for name, value in model.module.graph.graph.initializers.items() if name == "0.weight"
    )
    np.testing.assert_array_equal(found.numpy(), net()[0].weight.detach())  # type: ignore[union-attr]
    np.testing.assert_allclose(model.module(input=X)[0], WANTED, atol=1e-6)
