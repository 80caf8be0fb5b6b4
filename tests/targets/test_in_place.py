"""Exports of modules whose weights lie on disk: what is linked, what is written, and in which type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from enginewright.targets import simplify, stored, weights
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnx_files import check_onnx

X = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64)).eval()


@pytest.fixture
def module(tmp_path: Path) -> nn.Sequential:
    """A network whose weights are mapped from ``src/w.safetensors``."""
    (tmp_path / "src").mkdir()
    save_file(net().state_dict(), tmp_path / "src" / "w.safetensors")
    found = net()
    found.load_state_dict(stored.read(tmp_path / "src" / "w.safetensors"), assign=True)
    return found


def export(module: nn.Module, folder: Path, **more: object) -> Path:
    folder.mkdir()
    dynamic = {"input": {0: ("batch", 1, 8)}}
    path = folder / "model.onnx"
    export_onnx(module, {"input": X}, dynamic=dynamic, outputs=["y"], path=path, **more)  # type: ignore[arg-type]
    return path


def run(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"input": X.numpy()})[0]


def locations(path: Path) -> dict[str, str]:
    graph = onnx.load(path, load_external_data=False).graph
    return {t.name: e.value for t in graph.initializer for e in t.external_data if e.key == "location"}


def test_weights_on_disk_are_linked_and_nothing_is_written(module: nn.Module, tmp_path: Path) -> None:
    path = export(module, tmp_path / "out")
    assert set(locations(path).values()) == {"weights/w.safetensors"}
    assert (path.parent / "weights" / "w.safetensors").samefile(tmp_path / "src" / "w.safetensors")
    assert not path.with_suffix(".safetensors").exists()
    np.testing.assert_allclose(run(path), module(X).detach(), atol=1e-6)


def test_only_a_changed_tensor_is_written(module: nn.Sequential, tmp_path: Path) -> None:
    first = module[0]
    assert isinstance(first, nn.Linear)
    first.weight = nn.Parameter(first.weight.detach() * 2)
    path = export(module, tmp_path / "out")
    assert [tuple(t.shape) for t in load_file(path.with_suffix(".safetensors")).values()] == [(128, 64)]
    assert sorted(set(locations(path).values())) == ["model.safetensors", "weights/w.safetensors"]
    np.testing.assert_allclose(run(path), module(X).detach(), atol=1e-6)


def test_an_embedded_export_stands_alone_and_passes_the_checker(module: nn.Module, tmp_path: Path) -> None:
    path = export(module, tmp_path / "out", embed=True)
    assert set(locations(path).values()) == {"model.safetensors"}
    assert not (path.parent / "weights").exists()
    onnx.checker.check_model(path)
    np.testing.assert_allclose(run(path), module(X).detach(), atol=1e-6)


def test_across_file_systems_the_file_is_copied(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(weights.os, "link", refuse)
    path = export(module, tmp_path / "out")
    copy = path.parent / "weights" / "w.safetensors"
    assert not copy.samefile(tmp_path / "src" / "w.safetensors")
    assert copy.read_bytes() == (tmp_path / "src" / "w.safetensors").read_bytes()
    np.testing.assert_allclose(run(path), module(X).detach(), atol=1e-6)


def test_two_sources_of_one_name_stay_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file({name: torch.ones(3)}, tmp_path / name / "w.safetensors")
    names = weights.link([tmp_path / "one" / "w.safetensors", tmp_path / "two" / "w.safetensors"], tmp_path / "x")
    assert sorted(names.values()) == ["w-2.safetensors", "w.safetensors"]
    for source, name in names.items():
        assert (tmp_path / "x" / name).samefile(source)


def test_a_graph_that_the_checker_refuses_is_refused_with_linked_weights_too(module: nn.Module, tmp_path: Path) -> None:
    path = export(module, tmp_path / "out")
    graph = onnx.load(path, load_external_data=False)
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, path)
    with pytest.raises(onnx.checker.ValidationError, match="NoSuchOperator"):
        weights.check(path)


@pytest.mark.parametrize("embed", [False, True])
def test_float16_computes_in_float16_and_keeps_the_interface(module: nn.Module, tmp_path: Path, embed: bool) -> None:
    path = export(module, tmp_path / "out", embed=embed, dtype=torch.float16)
    graph = check_onnx(path).graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    large = {t.data_type for t in graph.initializer if np.prod(t.dims) > 1000}
    assert large == {onnx.TensorProto.FLOAT16 if embed else onnx.TensorProto.FLOAT}
    half = net().half()(X.half()).float().detach().numpy()
    found, exact = run(path), module(X).detach().numpy()
    np.testing.assert_allclose(found, half, atol=4e-3)
    assert np.abs(found - exact).max() > 1e-5, "nothing was computed in float16"


def test_the_module_itself_keeps_its_type(module: nn.Module, tmp_path: Path) -> None:
    export(module, tmp_path / "out", dtype=torch.float16)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(stored.place_of(p) for p in module.parameters())


def test_bfloat16_weights_compute_in_float32(tmp_path: Path) -> None:
    original = net().bfloat16()
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    module = net().bfloat16()
    module.load_state_dict(stored.read(tmp_path / "w.safetensors"), assign=True)
    path = export(module, tmp_path / "out", dtype=torch.float32)
    assert (path.parent / "weights" / "w.safetensors").samefile(tmp_path / "w.safetensors")
    np.testing.assert_allclose(run(path), original.float()(X).detach(), atol=1e-5)


def test_a_long_graph_without_rewrite_rules_computes_the_same(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplify, "LONG_GRAPH", 1)
    path = export(module, tmp_path / "out")
    assert set(locations(path).values()) == {"weights/w.safetensors"}
    np.testing.assert_allclose(run(path), module(X).detach(), atol=1e-6)
