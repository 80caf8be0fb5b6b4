"""Inputs that a pass adds, all the way into engines and back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import enginewright
from enginewright import pipeline, sources
from enginewright.added import Completing, completing, with_inputs
from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import clock_of, device_of, inputs_for, to_device_of
from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.opened import open_subject
from enginewright.passes.contract import Context, NewInput
from enginewright.passes.heads.perturb_heads import PerturbHeads
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.sources.contract import Model
from enginewright.sources.denoisers import DENOISERS
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import completed, draw
from tests.devices import FakeDevice, FakeRunner
from tests.toolchain.sources.tiny_diffusers import NETWORKS, shaken


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dit:tiny`` with every head of its last block perturbed, and guidance away from that; both are inputs."""
    out = tmp_path_factory.mktemp("guided") / "out"
    recipe = make(
        {
            "model": "dit:tiny",
            "gates": ["fidelity.relative_l2 <= 1e-5"],
            "steps": [{"pass": "perturb_heads", "guidance": True, "heads": {"blocks.1.*": []}}],
            "targets": [
                {"target": "onnxruntime"},
                {"target": "pytorch"},
                {"target": "tensorrt_rtx", "optional": True},
            ],
            "validation": {"rounds": 3, "calls": 2},
        }
    )
    _, code = pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    assert code == 0
    return out


def call(rows: int, **more: float) -> Arrays:
    given = draw(sources.load("dit:tiny").inputs, seed=3, sizes={"batch": rows})
    shapes = {"pag_u": (rows, 4), "pag_w": (rows,)}
    return {**given, **{name: np.full(shapes[name], value, np.float32) for name, value in more.items()}}


def test_the_artifact_tells_its_inputs_and_was_compared_at_their_defaults(guided: Path) -> None:
    inputs = {spec["name"]: spec for spec in json.loads((guided / "manifest.json").read_text())["interface"]["inputs"]}
    assert list(inputs) == ["x", "t", "y", "pag_u", "pag_w"]
    assert inputs["pag_u"]["shape"][0]["name"] == "batch"
    assert inputs["pag_u"]["shape"][1:] == [4]
    assert [inputs[name]["default"] for name in ("x", "pag_u", "pag_w")] == [None, 0, 0]
    report = record.read(guided / "report.json")
    assert report.verdict == "met"
    assert report.steps[0].macs.after > report.steps[0].macs.before
    ort, eager, rtx = report.targets
    assert all(target.fidelity[0].relative_l2 < 1e-5 for target in (ort, eager))
    assert rtx.built or rtx.reason


def test_the_block_before_the_first_chosen_head_stands_in_the_graph_once(guided: Path) -> None:
    nodes = onnx.load(guided / "model.onnx", load_external_data=False).graph.node
    places = Counter(
        entry.value for node in nodes if node.op_type in ("MatMul", "Gemm") for entry in node.metadata_props
    )
    assert places["blocks.0.mlp.fc1"] == places["t_embedder.mlp.0"] == 1
    assert places["blocks.1.mlp.fc1"] == places["blocks.1.attn.qkv.linear"] == 2


def test_an_engine_takes_them_and_does_without(guided: Path) -> None:
    engine = enginewright.load(guided, "onnxruntime")
    eager = enginewright.load(guided, "pytorch")
    plain = sources.load("dit:tiny").module(**{k: torch.from_numpy(v) for k, v in call(3).items()}).detach().numpy()

    np.testing.assert_allclose(engine(**call(3)), plain, atol=1e-5)
    moved = engine(**call(3, pag_u=0.5, pag_w=2))
    np.testing.assert_allclose(moved, eager(**call(3, pag_u=0.5, pag_w=2)), atol=1e-5)
    assert np.abs(moved - plain).max() > 1e-3


def test_whoever_does_not_know_them_can_run_the_engines(guided: Path) -> None:
    opened = open_subject(str(guided))
    assert opened.original is not None
    wanted = opened.original(call(2))["prediction_and_variance"]
    for runner in (opened.runners["onnxruntime"], opened.runners["pytorch"]):
        np.testing.assert_allclose(runner(call(2))["prediction_and_variance"], wanted, atol=1e-5)


def test_the_module_comes_back_with_them(guided: Path) -> None:
    module = enginewright.load_module(guided)
    given = {name: torch.from_numpy(array) for name, array in call(2, pag_u=0.5, pag_w=2).items()}
    with torch.no_grad():
        found = module(**given).numpy()
    np.testing.assert_allclose(
        found, enginewright.load(guided, "onnxruntime")(**call(2, pag_u=0.5, pag_w=2)), atol=1e-5
    )


def test_an_input_that_is_there_already_is_not_added() -> None:
    model = sources.load("dit:tiny")
    grown = with_inputs(model, [NewInput(name="u", shape=(3,))])
    assert grown.inputs[-1] == InputSpec(name="u", shape=(model.inputs[0].shape[0], 3), default=0.0)
    with pytest.raises(ToolchainError, match="has an input 'u' already"):
        with_inputs(grown, [NewInput(name="u")])


def test_a_call_is_completed_at_its_own_size_and_what_was_given_stays() -> None:
    batch = Dim(name="batch", low=1, typical=2, high=8)
    specs = [InputSpec(name="x", shape=(batch, 2)), InputSpec(name="u", shape=(batch, 3), default=0.5)]
    x = np.zeros((5, 2), np.float32)
    assert np.array_equal(completed({"x": x}, specs)["u"], np.full((5, 3), 0.5, np.float32))
    given = np.ones((5, 3), np.float32)
    assert completed({"x": x, "u": given}, specs)["u"] is given


def test_a_runner_that_cannot_tell_a_layer_says_nothing() -> None:
    def runner(inputs: Arrays) -> Arrays:
        return inputs

    specs = [InputSpec(name="x", shape=(1,))]
    assert completing(runner, specs) is runner
    assert Completing(runner, specs).first_non_finite({"x": np.zeros(1)}) == ""


@pytest.mark.slow
def test_joint_attention_is_guided_in_an_engine(tmp_path: Path) -> None:
    """Image, text and batch sizes stay dynamic."""
    import onnxruntime

    flat = DENOISERS["SD3Transformer2DModel"]
    net = flat.flat(shaken(NETWORKS["sd3"]()))
    specs = flat.inputs(net.inner.config)
    step = PerturbHeads(heads={"*transformer_blocks.1.attn": (0,)}, guidance=True)
    result = step.apply(net, Context())
    model = Model(name="sd3", module=result.model, inputs=specs, outputs=("out",), weights="")
    grown = with_inputs(model, step.new_inputs(result.plan)).inputs
    dims = {d.name: max(d.low, 2) for spec in specs for d in spec.shape if isinstance(d, Dim)}
    dynamic = {s.name: {i: (d.name, d.low, d.high) for i, d in enumerate(s.shape) if isinstance(d, Dim)} for s in grown}
    example = {key: torch.from_numpy(array) for key, array in draw(grown, seed=0, sizes=dims).items()}
    export_onnx(result.model, example, dynamic=dynamic, outputs=["out"], path=tmp_path / "m.onnx")

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        call = draw(grown, seed=4, sizes={**dims, "batch": rows})
        call |= {"pag_u": np.full((rows, 1), 0.5, np.float32), "pag_w": np.full(rows, 2, np.float32)}
        with torch.no_grad():
            wanted = result.model(**{key: torch.from_numpy(array) for key, array in call.items()}).numpy()
        (found,) = session.run(None, call)
        np.testing.assert_allclose(found, wanted, atol=5e-4)


def test_a_call_is_completed_before_it_goes_to_the_device() -> None:
    specs = (InputSpec(name="x", shape=(2,)), InputSpec(name="strength", shape=(2,), default=0.5))
    gpu = FakeDevice()
    runner = completing(FakeRunner(gpu, 1.0), specs)
    assert (device_of(runner), clock_of(runner)) == ("cuda:0", gpu.clock)
    given = inputs_for(runner, {"x": np.ones(2, np.float32)})
    assert {name: there.array.tolist() for name, there in given.items()} == {"x": [1, 1], "strength": [0.5, 0.5]}
    plain = completing(lambda inputs: inputs, specs)
    assert (device_of(plain), to_device_of(plain)) == ("cpu", None)
