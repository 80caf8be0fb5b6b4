from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from enginewright import pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim
from enginewright.opened import open_subject
from enginewright.passes.contract import cost
from enginewright.passes.kernel.graph_module import GraphModule
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.sources.contract import Model
from enginewright.validation.inputs import draw
from tests.graphs import mixed, noise, tensor, write

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def loaded(path: Path, sizes: str = "") -> Model:
    return sources.load(f"onnx:{path}{sizes}")


def run(model: Model, seed: int = 0) -> tuple[torch.Tensor, ...]:
    inputs = {name: torch.from_numpy(array) for name, array in draw(model.inputs, seed=seed).items()}
    return model.module(**inputs)


def cast(path: Path, kind: int, shape: list[int | str | None]) -> Path:
    node = helper.make_node("Cast", ["x"], ["y"], name="cast", to=FLOAT)
    return write(path, [node], [tensor("x", shape, kind)], ["y"])


def export(tmp_path: Path, **content: object) -> tuple[record.Report, int, Path]:
    out = tmp_path / "out"
    validation = {"rounds": 3, "calls": 2}
    report, code = pipeline.export(
        make({"validation": validation, **content}), out, force=False, progress=Progress(quiet=True)
    )
    return report, code, out


def test_the_file_itself_is_the_original(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        [tensor("x", ["batch", 4])],
        ["y"],
        {"w": noise(4, 2)},
    )
    model = loaded(path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model.module(x=x)[0], x @ torch.from_numpy(noise(4, 2)))
    assert model.outputs == ("y",)
    assert cost(model.module, None) == cost(model.module, {"x": x})
    assert (cost(model.module, None).parameter_count, cost(model.module, None).bytes) == (8, 32)
    assert cost(model.module, None).macs is None


def test_open_sizes_are_guessed_named_and_said(tmp_path: Path) -> None:
    model = loaded(cast(tmp_path / "m.onnx", FLOAT, [None, 3, "time", "?"]))
    [x] = model.inputs
    assert x.shape == (
        Dim(name="x_0", low=1, typical=2, high=8),
        3,
        Dim(name="time", low=16, typical=64, high=256),
        Dim(name="x_3", low=16, typical=64, high=256),
    )
    assert "sizes guessed: x_0 1 to 8, time 16 to 256" in model.weights


def test_sizes_and_values_can_be_given(tmp_path: Path) -> None:
    path = cast(tmp_path / "m.onnx", INT64, ["batch", "a.b", "c"])
    [x] = loaded(path, "?batch=1..4,a.b=48,c=8..16..32,x=0..9").inputs
    assert x.shape == (Dim(name="batch", low=1, typical=4, high=4), 48, Dim(name="c", low=8, typical=16, high=32))
    assert (x.low, x.high) == (0, 10)
    assert "guessed" not in loaded(path, "?batch=1,a.b=48,c=8").weights


def test_the_graph_keeps_its_open_dimensions_each_with_a_name(tmp_path: Path) -> None:
    model = loaded(cast(tmp_path / "m.onnx", FLOAT, ["batch", None, "?", 3]), "?batch=2")
    assert isinstance(model.module, GraphModule)
    [x] = model.module.graph.graph.inputs
    assert x.shape == ["batch", "x_1", "x_2", 3]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("?batch=x", "'batch=x' is not NAME=SIZE"),
        ("?batch=8..2", "'batch=8..2' is not"),
        ("?batch=0", "batch is 0; a size is at least 1"),
        ("?bach=2", "no dimension or input named 'bach'"),
    ],
)
def test_sizes_that_fit_nothing_are_quoted(tmp_path: Path, sizes: str, said: str) -> None:
    with pytest.raises(ToolchainError, match=said.replace(".", r"\.")):
        loaded(mixed(tmp_path / "m.onnx"), sizes)


def test_a_size_that_the_graph_cannot_run_says_how_to_give_another(tmp_path: Path) -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape")
    shape = {"shape": np.array([-1, 48], np.int64)}
    path = write(tmp_path / "m.onnx", [node], [tensor("x", ["n"])], ["y"], shape)
    with pytest.raises(ToolchainError, match=r"cannot run the graph on x \(2,\)") as caught:
        run(loaded(path))
    assert "onnx:FILE.onnx?NAME=SMALLEST..LARGEST" in str(caught.value)
    assert run(loaded(path, "?n=96"))[0].shape == (2, 48)


@pytest.mark.parametrize("kind", ["FLOAT16", "BOOL", "INT64", "INT32", "UINT8", "DOUBLE"])
def test_inputs_of_every_kind_of_number_run(tmp_path: Path, kind: str) -> None:
    model = loaded(cast(tmp_path / "m.onnx", getattr(TensorProto, kind), ["batch", 64]))
    [y] = run(model)
    assert y.shape == (2, 64)
    assert len(set(y.flatten().tolist())) > 1, "every value drawn is the same"
    if kind in ("BOOL", "INT64", "INT32", "UINT8"):
        assert set(y.flatten().tolist()) == {0.0, 1.0}


def test_initializers_that_are_inputs_too_are_no_inputs(tmp_path: Path) -> None:
    weight = noise(4, 2)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "old",
        [tensor("x", ["batch", 4]), tensor("w", [4, 2])],
        [tensor("y", ["batch", 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3), path)
    model = loaded(path)
    assert [spec.name for spec in model.inputs] == ["x"]
    report, code, out = export(tmp_path, model=f"onnx:{path}", targets=[{"target": "onnxruntime"}])
    assert code == 0
    assert report.targets[0].fidelity[0].cosine == pytest.approx(1)
    written = onnx.load(out / "model.onnx")
    assert [value.name for value in written.graph.input] == ["x"]
    assert written.opset_import[0].version == 8


def with_branch(path: Path) -> Path:
    """y = x W when the flag is set, else -x; W lies in the branch."""
    weight = numpy_helper.from_array(noise(64, 64), "w")
    result = tensor("r", None)
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["r"], name="inner")], "then", [], [result], [weight]
    )
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["r"], name="negate")], "else", [], [result])
    nodes = [
        helper.make_node("If", ["flag"], ["h"], name="choose", then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["h", "v"], ["y"], name="outer"),
    ]
    inputs = [tensor("x", ["batch", 64]), tensor("flag", [], TensorProto.BOOL)]
    for graph in (then, other):
        graph.output[0].CopyFrom(tensor("r", ["batch", 64]))
    nodes[0] = helper.make_node("If", ["flag"], ["h"], name="choose", then_branch=then, else_branch=other)
    return write(path, nodes, inputs, ["y"], {"v": noise(64, 32, seed=1)})


def test_branches_go_through_the_whole_pipeline(tmp_path: Path) -> None:
    path = with_branch(tmp_path / "m.onnx")
    report, code, _ = export(
        tmp_path,
        model=f"onnx:{path}",
        steps=[{"pass": "quantize_graph_int8"}],
        targets=[{"target": "onnxruntime"}],
    )
    assert code == 0
    [step] = report.steps
    assert step.changed == ["outer"]
    assert {skip.path: skip.reason for skip in step.skipped} == {"inner": "stands in a branch or a loop"}
    assert report.model.parameter_count == 64 * 64 + 64 * 32
    assert 0.999 < report.targets[0].fidelity[0].cosine < 1


def test_an_artifact_of_a_graph_is_opened_again(tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.onnx")
    steps = [{"pass": "quantize_graph_int8"}]
    targets = [{"target": "onnxruntime"}, {"target": "pytorch"}]
    _, _, out = export(tmp_path, model=f"onnx:{path}?batch=1..4", steps=steps, targets=targets)
    opened = open_subject(str(out), threads=1)
    call = draw(opened.inputs, seed=1)
    assert opened.original is not None
    wanted = opened.original(call)["y"]
    for runner in opened.runners.values():
        error = np.linalg.norm(runner(call)["y"] - wanted) / np.linalg.norm(wanted)
        assert 0 < error < 0.1
    assert open_subject(f"onnx:{path}", threads=1).original is not None


def test_nothing_of_the_machine_is_written_and_the_rest_stays(tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[0].doc_string = 'File "/home/someone/net.py", line 3, in forward'
    model.graph.node[1].doc_string = "the first activation"
    model.graph.node[2].name = "/blocks/first/grouped"
    helper.set_model_props(
        model, {"labels": "cat\ndog", "source": r"C:\models\net.pt", "see": "https://example.org/a/b"}
    )
    onnx.save(model, path)
    _, _, out = export(tmp_path, model=f"onnx:{path}", validation={"skip": True})
    text = (out / "model.onnx").read_bytes()
    assert b"someone" not in text
    written = onnx.load(out / "model.onnx")
    assert {p.key: p.value for p in written.metadata_props} == {"labels": "cat\ndog", "see": "https://example.org/a/b"}
    assert written.graph.node[1].doc_string == "the first activation"
    assert written.graph.node[2].name == "/blocks/first/grouped"
    assert (out / "model.safetensors").is_file()


def refused(path: Path, sizes: str = "") -> str:
    with pytest.raises(ToolchainError) as caught:
        loaded(path, sizes)
    return str(caught.value)


def test_files_that_are_no_onnx_are_refused(tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.onnx")
    whole = path.read_bytes()
    assert "no ONNX file 'gone.onnx'" in refused(tmp_path / "gone.onnx")
    path.write_bytes(whole[: len(whole) // 2])
    assert "not an ONNX file, or was cut short" in refused(path)
    path.write_bytes(b"")
    assert "holds no ONNX graph" in refused(path)
    path.write_text("a text of no use")
    assert "m.onnx" in refused(path)


def test_external_data_outside_the_folder_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = mixed(tmp_path / "a" / "m.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    data = path.with_name("m.data")
    assert run(loaded(path))[0].shape == (2, 4)
    data.write_bytes(data.read_bytes()[:-1000])
    assert "ends at byte" in refused(path)
    data.rename(tmp_path / "m.data")
    data.symlink_to(tmp_path / "m.data")
    assert "outside the model's folder" in refused(path)


def test_a_domain_that_no_runtime_knows_is_named_with_its_operators(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Twist", ["x"], ["h"], domain="my.ops"),
        helper.make_node("Twist", ["h"], ["i"], domain="my.ops"),
        helper.make_node("Fold", ["i"], ["y"], domain="my.ops"),
    ]
    graph = helper.make_graph(nodes, "g", [tensor("x", [2])], [tensor("y", [2])])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    message = refused(path)
    assert "no runtime here knows the domain 'my.ops': Twist (2), Fold (1)" in message
    assert "as ONNX functions" in message


def test_functions_that_the_file_brings_are_written_out(tmp_path: Path) -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)]
    body = [helper.make_node("MatMul", ["a", "b"], ["c"], name="product")]
    function = helper.make_function("my.ops", "Twist", ["a", "b"], ["c"], body, imports[:1])
    node = helper.make_node("Twist", ["x", "w"], ["y"], domain="my.ops", name="twist")
    graph = helper.make_graph(
        [node], "g", [tensor("x", ["n", 64])], [tensor("y", ["n", 32])], [numpy_helper.from_array(noise(64, 32), "w")]
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=8), path)
    model = loaded(path)
    assert isinstance(model.module, GraphModule)
    assert [node.op_type for node in model.module.graph.graph] == ["MatMul"]
    assert run(model)[0].shape == (2, 32)


def test_inputs_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    assert "input 'x' has no known rank" in refused(unranked(tmp_path / "a.onnx"))
    length = helper.make_node("StringNormalizer", ["x"], ["y"], is_case_sensitive=1)
    graph = helper.make_graph(
        [length], "g", [tensor("x", [1], TensorProto.STRING)], [tensor("y", [1], TensorProto.STRING)]
    )
    strings = tmp_path / "b.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), strings)
    assert "input 'x' is of type STRING; only tensors of numbers" in refused(strings)
    sequence = helper.make_tensor_sequence_value_info("x", FLOAT, [2])
    graph = helper.make_graph(
        [helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0)], "g", [sequence], [tensor("y", ["n"])]
    )
    sequences = tmp_path / "c.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), sequences)
    assert "input 'x' is no tensor but: sequence" in refused(sequences)


def unranked(path: Path) -> Path:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [tensor("x", None)], [tensor("y", [2])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_what_the_standard_forbids_is_quoted(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["nowhere"], ["y"], name="relu")
    graph = helper.make_graph([node], "g", [tensor("x", [2])], [tensor("y", [2])])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    assert "is not valid ONNX: Nodes in a graph must be topologically sorted" in refused(path)


@pytest.mark.parametrize(
    ("model", "step", "said", "help"),
    [
        (
            "onnx:m.onnx",
            "prune_heads",
            "prune_heads works on PyTorch modules",
            "passes for ONNX graphs: quantize_graph",
        ),
        ("dit:tiny", "quantize_graph_int8", "quantize_graph_int8 works on ONNX graphs", "passes for PyTorch modules: "),
    ],
)
def test_a_pass_of_the_other_kind_is_found_before_any_work(model: str, step: str, said: str, help: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        make({"model": model, "steps": [{"pass": step}]})
    assert said in str(caught.value)
    assert repr(model) in str(caught.value)
    assert help in str(caught.value)


@pytest.mark.parametrize(
    ("file", "sizes"),
    [
        ("silero_vad_16k_op15.onnx", "?batch=1,sequence=576"),
        ("silero_vad.onnx", "?input_0=1,input_1=576,state_1=1,sr=16000"),
    ],
)
def test_a_real_recurrent_model_with_branches(tmp_path: Path, file: str, sizes: str) -> None:
    found = find_spec("silero_vad")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "data" / file
    steps = [{"pass": "quantize_graph_int8"}]
    report, _, _ = export(tmp_path, model=f"onnx:{path}{sizes}", steps=steps, targets=[{"target": "onnxruntime"}])
    assert report.targets[0].built
    assert not report.targets[0].faults
