from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.ground.runner import clock_of, device_of, inputs_for, to_device_of
from enginewright.passes.quantization.linear import QuantizedLinear
from enginewright.targets import machine, onnxruntime_engine
from enginewright.targets.contract import Answer, Graph, LayerHint, ShapeRange
from enginewright.targets.dynamic_int8 import reduce_range, to_float
from enginewright.targets.onnx_export import export_onnx, save
from enginewright.targets.onnxruntime_engine import OnnxRuntime, SessionRunner, nodes_elsewhere, refuse_another
from tests import graphs


class Net(nn.Module):
    """Two layers that read one input, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.a(x)) + self.b(x))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, dict[str, np.ndarray], Path]:
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(4, 64)
    quantized = Net().eval()
    for name, scale in (("a", 4 / 127), ("b", 4 / 127), ("c", 6 / 127)):
        setattr(quantized, name, QuantizedLinear(getattr(net, name), scale))
    root = tmp_path_factory.mktemp("artifact")
    for name, module in (("fp32", net), ("int8", quantized)):
        (root / name).mkdir()
        export_onnx(
            module.eval(),
            {"x": x},
            dynamic={"x": {0: ("batch", 1, 8)}},
            outputs=["y"],
            path=root / name / "model.onnx",
        )
    return net, {"x": x.numpy()}, root


def built(
    root: Path,
    name: str,
    target: OnnxRuntime,
    x: dict[str, np.ndarray],
    hints: dict[str, LayerHint] | None = None,
) -> Path:
    folder = root / name / "engines" / f"engine{len(list((root / name).rglob('engine.json')))}"
    folder.mkdir(parents=True)
    shapes = ShapeRange((1, 64), (4, 64), (8, 64))
    graph = Graph(path=root / name / "model.onnx", ranges={"x": shapes}, examples=[x], hints=hints or {})
    target.build(graph, folder)
    return folder


def operators(folder: Path) -> set[str]:
    path = folder / json.loads((folder / "engine.json").read_text())["graph"]
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def test_a_float_graph_is_used_where_it_lies(exported: tuple[Net, dict[str, np.ndarray], Path]) -> None:
    net, x, root = exported
    folder = built(root, "fp32", OnnxRuntime(), x)
    assert [path.name for path in folder.iterdir()] == ["engine.json"]
    found = OnnxRuntime().load(folder, threads=1)(x)["y"]
    np.testing.assert_allclose(found, net(torch.from_numpy(x["x"])).detach(), rtol=1e-4, atol=1e-5)


def test_both_forms_of_8_bit_products_are_near_and_dynamic_measures_shared_inputs_once(
    exported: tuple[Net, dict[str, np.ndarray], Path],
) -> None:
    net, x, root = exported
    wanted = net(torch.from_numpy(x["x"])).detach().numpy()
    for form, operator in (("static", "QuantizeLinear"), ("dynamic", "MatMulInteger")):
        folder = built(root, "int8", OnnxRuntime(int8=form), x)
        assert operator in operators(folder)
        found = OnnxRuntime().load(folder, threads=1)(x)["y"]
        assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.03, form
    graph = onnx.load(folder / "dynamic.onnx", load_external_data=False).graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 3
    assert sum(node.op_type == "DynamicQuantizeLinear" for node in graph.node) == 2
    assert not operators(folder) & {"QuantizeLinear", "DequantizeLinear"}


def test_auto_measures_keeps_one_form_and_says_which(exported: tuple[Net, dict[str, np.ndarray], Path]) -> None:
    _, x, root = exported
    folder = root / "int8" / "engines" / "auto"
    folder.mkdir(parents=True)
    graph = Graph(path=root / "int8" / "model.onnx", ranges={}, examples=[x])
    result = OnnxRuntime().build(graph, folder)
    assert result.resolved["int8"] in ("static", "dynamic")
    assert f"{result.resolved['int8']} 8-bit products" in result.notes[-2]
    assert "of the time of the same graph in fp32" in result.notes[-1]
    assert ("NOT faster" in result.notes[-1]) == (float(result.notes[-1].rpartition(" took ")[2].split()[0]) >= 1)
    assert not list(folder.glob("fp32*"))
    assert ("MatMulInteger" in operators(folder)) == (result.resolved["int8"] == "dynamic")


def test_marked_layers_get_7_bits_only_where_the_processor_saturates(
    exported: tuple[Net, dict[str, np.ndarray], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, root = exported
    hints = {"a": LayerHint(reduced_range=True), "b": LayerHint(reduced_range=False)}
    largest = {}
    for saturates in (False, True):
        monkeypatch.setattr(machine, "int8_saturates", lambda answer=saturates: answer)
        folder = built(root, "int8", OnnxRuntime(int8="dynamic"), x, hints)
        weights = {
            t.name: np.abs(onnx.numpy_helper.to_array(t, str(folder)).astype(int)).max()
            for t in onnx.load(folder / "dynamic.onnx", load_external_data=False).graph.initializer
            if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2
        }
        largest[saturates] = (weights["a.weight"], weights["b.weight"])
        found = OnnxRuntime().load(folder, threads=1)(x)["y"]
        wanted = net(torch.from_numpy(x["x"])).detach().numpy()
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.03
    assert largest[False] == (127, 127)
    assert largest[True] == (64, 127)


def test_taking_the_8_bits_out_again_gives_the_rounded_weights_in_fp32(
    exported: tuple[Net, dict[str, np.ndarray], Path], tmp_path: Path
) -> None:
    net, x, root = exported
    model = ir.load(root / "int8" / "model.onnx")
    assert to_float(model) == 3
    save(model, tmp_path / "model.onnx")
    assert not {"QuantizeLinear", "DequantizeLinear"} & {
        node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    }
    rounded = Net().eval()
    for name in ("a", "b", "c"):
        layer, linear = QuantizedLinear(getattr(net, name), 1.0), getattr(rounded, name)
        linear.weight.data = (layer.weight.float() * layer.weight_scale).T
        linear.bias = layer.bias
    found = OnnxRuntime().open(tmp_path / "model.onnx", 1)(x)["y"]
    np.testing.assert_allclose(found, rounded(torch.from_numpy(x["x"])).detach(), rtol=1e-4, atol=1e-5)


def test_an_engine_file_that_points_outside_the_artifact_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "artifact" / "engines" / "onnxruntime"
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text('{"graph": "../../../elsewhere.onnx"}')
    with pytest.raises(ToolchainError, match="outside the artifact; refused"):
        OnnxRuntime().load(folder, threads=1)


def test_the_first_value_that_is_not_finite_is_named_by_its_layer(tmp_path: Path) -> None:
    net = Net().eval()
    with torch.no_grad():
        net.b.weight[0, 0] = float("inf")
    x = {"x": np.ones((2, 64), np.float32)}
    export_onnx(net, {"x": torch.ones(2, 64)}, dynamic={}, outputs=["y"], path=tmp_path / "model.onnx")
    runner = OnnxRuntime().open(tmp_path / "model.onnx", 1)
    assert not np.isfinite(runner(x)["y"]).all()
    assert runner.first_non_finite(x) == "b"  # type: ignore[attr-defined]


def test_availability_tells_what_stands_in_the_way() -> None:
    assert OnnxRuntime().availability().why_not("runnable") == ""
    assert "CUDAExecutionProvider" in OnnxRuntime(provider="cuda").availability().why_not("runnable")


def test_a_scale_for_each_row_keeps_small_rows_beside_a_large_one(
    exported: tuple[Net, dict[str, np.ndarray], Path],
) -> None:
    net, x, root = exported
    uneven = {"x": (x["x"] * np.array([[100], [1], [0.01], [0]])).astype(np.float32)}
    with torch.no_grad():
        exact = net(torch.from_numpy(uneven["x"])).numpy()
    errors = {}
    for rows in (False, True):
        hints = {path: LayerHint(rows=rows) for path in ("a", "b", "c")}
        target = OnnxRuntime(int8="dynamic")
        runner = target.load(built(root, "int8", target, uneven, hints), threads=1)
        errors[rows] = np.abs(runner(uneven)["y"] - exact).max(axis=1) / np.abs(exact).max(axis=1)
    assert errors[True].max() < 0.03
    assert errors[False][2] > 0.2, "a row of a ten-thousandth of the largest must be lost without its own scale"


def test_only_marked_layers_get_a_scale_for_each_row_and_share_it(
    exported: tuple[Net, dict[str, np.ndarray], Path],
) -> None:
    _, x, root = exported
    hints = {"a": LayerHint(rows=True), "b": LayerHint(rows=True), "c": LayerHint(rows=False)}
    folder = built(root, "int8", OnnxRuntime(int8="dynamic"), x, hints)
    graph = onnx.load(folder / "dynamic.onnx", load_external_data=False).graph
    count = [node.op_type for node in graph.node].count
    assert (count("ReduceMin"), count("DynamicQuantizeLinear"), count("MatMulInteger")) == (1, 2, 3)


@pytest.mark.parametrize(
    ("static_scale", "wanted"), [(4 / 127, "static"), (40 / 127, "dynamic")], ids=["as good", "far off"]
)
def test_the_faster_form_is_not_taken_where_it_is_far_off(
    static_scale: float, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    x = torch.randn(4, 64)
    (tmp_path / "int8").mkdir()
    module = nn.Sequential(QuantizedLinear(layer, static_scale)).eval()
    path = tmp_path / "int8" / "model.onnx"
    export_onnx(module, {"input": x}, dynamic={"input": {0: ("batch", 1, 8)}}, outputs=["y"], path=path)
    taken = {"static": 1.0, "dynamic": 2.0, "fp32": 3.0}
    monkeypatch.setattr(OnnxRuntime, "race", lambda *_: taken)
    folder = tmp_path / "int8" / "engines" / "one"
    folder.mkdir(parents=True)
    graph = Graph(path=path, ranges={}, examples=[{"input": x.numpy()}])
    built = OnnxRuntime().build(graph, folder)
    assert built.resolved == {"int8": wanted}
    assert ("relative error" in built.notes[0]) == (wanted == "dynamic")
    assert "2.00 of the static form's time" in built.notes[0]


@pytest.mark.parametrize(("static", "dynamic"), [(1.0, 0.95), (1.0, 1.05), (1.0, 1.0)])
def test_times_that_cannot_be_told_apart_leave_the_choice_to_the_error(
    static: float, dynamic: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    for scale, wanted in ((4 / 127, "static"), (8 / 127, "dynamic")):
        root = tmp_path / wanted
        (root / "engines" / "one").mkdir(parents=True)
        module = nn.Sequential(QuantizedLinear(nn.Linear(64, 64), scale)).eval()
        export_onnx(module, {"input": x}, dynamic={}, outputs=["y"], path=root / "model.onnx")
        monkeypatch.setattr(OnnxRuntime, "race", lambda *_: {"static": static, "dynamic": dynamic, "fp32": 3.0})
        graph = Graph(path=root / "model.onnx", ranges={}, examples=[{"input": x.numpy()}])
        built = OnnxRuntime().build(graph, root / "engines" / "one")
        assert "which timing cannot tell apart" in built.notes[0]
        errors = [float(found) for found in re.findall(r"error is ([\d.e-]+), not ([\d.e-]+)", built.notes[0])[0]]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize(("call_s", "rounds"), [(0.001, 12), (1.0, 11), (60.0, 3)])
def test_a_race_of_long_calls_has_fewer_rounds(
    call_s: float, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    class Slow:
        calls = 0

        def run(self, *_: object) -> None:
            self.calls += 1
            clock[0] += call_s

    monkeypatch.setattr("enginewright.targets.onnxruntime_engine.time.perf_counter", lambda: clock[0])
    session = Slow()
    graph = Graph(path=tmp_path, ranges={}, examples=[{}])
    assert OnnxRuntime().race({"static": session}, graph) == {"static": pytest.approx(call_s)}
    assert session.calls == 2 * rounds


def test_a_file_that_is_quantized_already_is_left_as_it_is_unless_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    module = nn.Sequential(QuantizedLinear(nn.Linear(64, 64), 4 / 127)).eval()
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "model.onnx"
    export_onnx(module, {"input": x}, dynamic={}, outputs=["y"], path=path)
    graph = Graph(path=path, ranges={}, examples=[{"input": x.numpy()}], untouched=True)
    for number, (int8, form) in enumerate((("auto", "static"), ("static", "static"), ("dynamic", "dynamic"))):
        folder = tmp_path / "a" / "engines" / str(number)
        folder.mkdir(parents=True)
        target = OnnxRuntime(int8=int8)
        built = target.build(graph, folder)
        assert built.resolved == {"int8": form}
        got = target.load(folder, threads=1)({"input": x.numpy()})["y"]
        same = np.array_equal(got, target.open(path, 1)({"input": x.numpy()})["y"])
        assert same == (form == "static")
        assert any("as the file holds them" in note for note in built.notes) == (form == "static")


def test_a_graph_that_the_optimizer_itself_breaks_is_opened_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 64)
    export_onnx(nn.Linear(64, 64).eval(), {"input": x}, dynamic={}, outputs=["y"], path=tmp_path / "m.onnx")
    true = onnxruntime.InferenceSession

    def fragile(*given: Any, **named: Any) -> Any:
        if "QDQSelectorActionTransformer" not in named["disabled_optimizers"]:
            raise RuntimeError("Type Error: Type parameter (T1) of Optype (MatMulNBits) bound to different types")
        return true(*given, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", fragile)
    (tmp_path / "engines" / "one").mkdir(parents=True)
    built = OnnxRuntime().build(Graph(path=tmp_path / "m.onnx", ranges={}), tmp_path / "engines" / "one")
    assert built.notes == (
        "ONNX Runtime itself fails on this graph unless its QDQSelectorActionTransformer is off, so it is",
    )


def test_a_layer_that_is_called_twice_is_changed_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = QuantizedLinear(nn.Linear(64, 64), 4 / 127)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.a(x))

    module, x = Twice().eval(), torch.randn(4, 64)
    export_onnx(module, {"x": x}, dynamic={}, outputs=["y"], path=tmp_path / "m.onnx")
    halved = ir.load(tmp_path / "m.onnx")
    assert reduce_range(halved, {"a"}) == 1
    (weight,) = {
        value
        for value in halved.graph.initializers.values()
        if value.dtype == ir.DataType.INT8 and value.shape.rank() == 2
    }
    assert abs(weight.const_value.numpy()).max() == 64
    model = ir.load(tmp_path / "m.onnx")
    assert to_float(model) == 2


def test_seven_bits_of_one_layer_leave_layers_that_share_its_constants_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (8, 8)).astype(np.int8)
    quantized = [
        onnx.helper.make_node("QuantizeLinear", ["x", "step", "none"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "step", "none"], ["x8"]),
    ]
    layers = []
    for name, held, scale in (("a", "w", "s"), ("b", "w", "s2"), ("c", "w2", "s")):
        layers += [
            onnx.helper.make_node("DequantizeLinear", [held, scale], [f"{name}.w"]),
            onnx.helper.make_node("MatMul", ["x8", f"{name}.w"], [name], name=name),
        ]
    constants = {
        **{"w": weight, "w2": weight[::-1].copy(), "s": np.float32(0.02), "s2": np.float32(0.05)},
        **{"step": np.float32(0.03), "none": np.int8(0)},
    }
    nodes = [*quantized, *layers]
    path = graphs.write(tmp_path / "m.onnx", nodes, [graphs.tensor("x", [4, 8])], ["a", "b", "c"], constants)
    model = ir.load(path)
    for node in model.graph:
        node.metadata_props["module"] = node.name or ""
    call = {"x": rng.standard_normal((4, 8)).astype(np.float32)}
    wanted = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, call)
    assert reduce_range(model, {"a"}) == 1
    ir.save(model, tmp_path / "reduced.onnx")
    got = onnxruntime.InferenceSession(tmp_path / "reduced.onnx", providers=["CPUExecutionProvider"]).run(None, call)
    assert np.array_equal(got[1], wanted[1])
    assert np.array_equal(got[2], wanted[2])
    assert 0 < np.linalg.norm(got[0] - wanted[0]) / np.linalg.norm(wanted[0]) < 0.05
    assert ir.load(tmp_path / "reduced.onnx").graph.initializers.keys() == {*constants, "w.7bit", "s.7bit"}


def test_sizes_that_the_graph_does_not_take_are_named_without_a_traceback(tmp_path: Path) -> None:
    path = graphs.write(
        tmp_path / "m.onnx",
        [onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [graphs.tensor("x", ["batch", "time"])],
        ["y"],
        {"shape": np.array([2, 6])},
    )
    runner = OnnxRuntime().open(path, threads=1)
    assert runner({"x": np.ones((3, 4), np.float32)})["y"].shape == (2, 6)
    with pytest.raises(ToolchainError, match=r"cannot run the graph at batch = 3, time = 5 \(x \(3, 5\)\): .*Reshape"):
        runner({"x": np.ones((3, 5), np.float32)})


def test_a_silent_fall_back_to_the_cpu_is_a_fault() -> None:
    class Session:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    refuse_another(Session(), "CPUExecutionProvider")
    with pytest.raises(UnavailableError, match="asked for CUDAExecutionProvider and took CPUExecutionProvider"):
        refuse_another(Session(), "CUDAExecutionProvider")


def test_tensors_go_in_and_come_out_without_a_copy(
    exported: tuple[Net, dict[str, np.ndarray], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, x, root = exported
    path = root / "fp32" / "model.onnx"
    runner = SessionRunner(OnnxRuntime().session(path, 1), path)
    given = torch.from_numpy(x["x"])
    bound: list[Any] = []
    binding = runner.session.io_binding

    def seen() -> Any:
        bound.append(binding())
        return bound[-1]

    monkeypatch.setattr(runner.session, "io_binding", seen)
    found = runner({"x": given, "gone": torch.zeros(1)})["y"]
    assert bound[0]._bound_inputs["x"].data_ptr() == given.data_ptr()
    assert bound[0].get_outputs()[0].data_ptr() == found.data_ptr()
    np.testing.assert_array_equal(found.numpy(), runner(x)["y"])
    assert isinstance(runner(x)["y"], np.ndarray)


def test_what_it_gave_stays_after_the_next_call(exported: tuple[Net, dict[str, np.ndarray], Path]) -> None:
    _, x, root = exported
    path = root / "fp32" / "model.onnx"
    runner = SessionRunner(OnnxRuntime().session(path, 1), path)
    first = runner({"x": torch.from_numpy(x["x"])})["y"]
    kept = first.clone()
    runner({"x": torch.zeros(4, 64)})
    assert torch.equal(first, kept)


def test_a_call_with_tensors_of_a_wrong_size_says_which(exported: tuple[Net, dict[str, np.ndarray], Path]) -> None:
    path = exported[2] / "fp32" / "model.onnx"
    runner = SessionRunner(OnnxRuntime().session(path, 1), path)
    with pytest.raises(ToolchainError, match=r"cannot run the graph at .*x \(4, 65\)"):
        runner({"x": torch.zeros(4, 65)})


class FakeBinding:
    """Takes down in which order it is asked for what."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.done.append(f"input {name}")

    def bind_output(self, name: str, device: str, number: int) -> None:
        self.done.append(f"output {name} on {device} {number}")

    def get_outputs(self) -> list[torch.Tensor]:
        return [torch.ones(1)]


class FakeSession:
    def __init__(self) -> None:
        self.done: list[str] = []

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="x", shape=[1])]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="y", shape=[1])]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self.done)

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        self.done.append("run")


def test_on_cuda_outputs_stay_there_and_pytorch_has_written_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    monkeypatch.setattr(onnxruntime_engine, "written", lambda device: session.done.append(f"written on {device}"))
    SessionRunner(session, Path("m"), device="cuda:0")({"x": torch.ones(1)})
    assert session.done == ["input x", "output y on cuda 0", "written on cuda:0", "run"]


@pytest.mark.parametrize("there", [True, False])
def test_inputs_are_placed_where_pytorch_has_cuda_and_else_copied_by_the_session(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "has_cuda", lambda: Answer(there))
    runner = SessionRunner(FakeSession(), Path("m"), device="cuda:0")
    assert device_of(runner) == "cuda:0"
    assert (to_device_of(runner) is not None) == there
    assert (clock_of(runner) is time.perf_counter) != there


def test_nodes_that_fell_to_another_provider_are_counted(exported: tuple[Net, dict[str, np.ndarray], Path]) -> None:
    """The real answer of a session on the CPU, held against CUDA: every node fell to the CPU."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(onnxruntime_engine.ASSIGNMENT, "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = exported[2] / "fp32" / "model.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert nodes_elsewhere(session, "CPUExecutionProvider") == []
    (note,) = nodes_elsewhere(session, "CUDAExecutionProvider")
    assert note == (
        "5 of 5 nodes do not run on CUDAExecutionProvider but on CPUExecutionProvider: 3 Gemm, 1 Relu, 1 Add"
    )


def test_a_runtime_that_cannot_say_where_nodes_run_is_said() -> None:
    assert nodes_elsewhere(object(), "CUDAExecutionProvider") == [
        "this ONNX Runtime cannot say whether every node runs on CUDAExecutionProvider"
    ]


def test_a_session_on_an_accelerator_is_asked_for_its_nodes_and_may_not_fall_back_later(
    exported: tuple[Net, dict[str, np.ndarray], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that took the provider asked for, with options set, but ran one node elsewhere."""
    made: list[Any] = []

    class Session:
        def __init__(self, path: Path, options: Any, *, providers: list[str], disabled_optimizers: list[str]) -> None:
            self.options, self.providers, self.fallback = options, providers, True
            made.append(self)

        def get_providers(self) -> list[str]:
            return [*self.providers, "CPUExecutionProvider"]

        def disable_fallback(self) -> None:
            self.fallback = False

        def get_provider_graph_assignment_info(self) -> list[Any]:
            def part(provider: str, *operators: str) -> Any:
                return SimpleNamespace(
                    ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=each) for each in operators]
                )

            return [part("CUDAExecutionProvider", "Gemm", "Gemm"), part("CPUExecutionProvider", "Shape")]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    graph = Graph(path=exported[2] / "fp32" / "model.onnx", ranges={})
    (tmp_path / "engines" / "cuda").mkdir(parents=True)
    built = OnnxRuntime(provider="cuda").build(graph, tmp_path / "engines" / "cuda")
    assert built.notes == ("1 of 3 nodes do not run on CUDAExecutionProvider but on CPUExecutionProvider: 1 Shape",)
    assert made[0].options.get_session_config_entry(onnxruntime_engine.ASSIGNMENT) == "1"
    assert made[0].fallback is False


@pytest.mark.gpu
def test_on_a_gpu_tensors_stay_there_and_agree_with_the_host(
    exported: tuple[Net, dict[str, np.ndarray], Path],
) -> None:
    target = OnnxRuntime(provider="cuda")
    if why := target.availability().why_not("runnable"):
        pytest.skip(why)
    net, x, root = exported
    runner = target.open(root / "fp32" / "model.onnx", 1)
    found = runner(inputs_for(runner, x))["y"]
    assert found.device.type == "cuda"
    np.testing.assert_allclose(found.cpu().numpy(), runner(x)["y"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(runner(x)["y"], net(torch.from_numpy(x["x"])).detach(), rtol=1e-2, atol=1e-2)
