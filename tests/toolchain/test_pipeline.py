from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enginewright import artifact as artifacts
from enginewright import pipeline, sources
from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.opened import open_subject, replay
from enginewright.passes.contract import Plan
from enginewright.passes.kernel.surgery import share
from enginewright.pipeline import Run, exit_code
from enginewright.progress import Progress
from enginewright.recipe import make, read
from enginewright.reports import record
from enginewright.targets.contract import Answer, Availability
from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx
from enginewright.validation.inputs import draw

QUIET = Progress(quiet=True)


def test_the_artifact_is_whole_and_says_what_ran(artifact: Path) -> None:
    manifest = artifacts.read_manifest(artifact)
    assert {"model.onnx", "model.safetensors", "recipe.toml", "plans/01-quantize_int8.json"} <= manifest["files"].keys()
    assert (artifact / "report.html").is_file()
    report = record.read(artifact / "report.json")
    assert report.verdict == "met"
    step = report.steps[0]
    assert len(step.changed) > 10
    assert {skip.path for skip in step.skipped} >= {"x_embedder.proj", "y_embedder.embedding_table"}
    assert step.bytes.after < step.bytes.before
    assert step.macs.after == step.macs.before
    ort, tensorrt = report.targets
    assert ort.built
    assert ort.fidelity[0].output == "prediction_and_variance"
    assert 0 < ort.fidelity[0].relative_l2 < 0.2
    assert len(ort.latency.samples_s) == len(ort.latency.original_samples_s) == 4
    assert tensorrt.optional
    if not tensorrt.built:
        assert tensorrt.reason
        assert tensorrt.latency is None
    assert "auto" not in (artifact / "recipe.toml").read_text()


def test_nothing_of_this_machine_is_in_the_artifact(artifact: Path) -> None:
    words = [
        str(Path.home()).encode(),
        str(artifact.parent).encode(),
        str(Path(__file__).parent.parent.parent).encode(),
    ]
    for path in artifact.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(len(word) > 5 and word in content for word in words), path


def test_running_its_recipe_again_gives_the_same_plans_and_the_same_onnx_bytes(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    report, _ = pipeline.export(read(artifact / "recipe.toml"), out, force=False, progress=QUIET)
    before = record.read(artifact / "report.json")
    assert [s.plan_digest for s in report.steps] == [s.plan_digest for s in before.steps]
    for name in ("model.onnx", "model.safetensors", "plans/01-quantize_int8.json"):
        assert (out / name).read_bytes() == (artifact / name).read_bytes(), name
    assert artifacts.read_manifest(out)["plans"] == artifacts.read_manifest(artifact)["plans"]


def test_replaying_the_plans_gives_the_module_that_was_exported(artifact: Path) -> None:
    run = Run(read(artifact / "recipe.toml"), QUIET)
    module = replay(run, artifact)
    call = draw(run.model.inputs, seed=5)
    with torch.no_grad():
        wanted = module(**{k: torch.from_numpy(v) for k, v in call.items()}).numpy()
    original = run.model.module
    found = open_subject(str(artifact / "model.onnx")).runners["model.onnx"](call)
    np.testing.assert_allclose(next(iter(found.values())), wanted, rtol=1e-2, atol=2e-2 * np.abs(wanted).max())
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in original.parameters())


def test_the_copy_shares_every_tensor_and_leaves_the_original_alone() -> None:
    module = sources.load("dit:tiny").module
    copy = share(module)
    assert all(a is b for a, b in zip(module.parameters(), copy.parameters(), strict=True))
    copy.blocks[0].attn = torch.nn.Identity()
    assert not isinstance(module.blocks[0].attn, torch.nn.Identity)


def test_structure_and_8_bits_together(tmp_path: Path) -> None:
    recipe = make(
        {
            "model": "dit:tiny",
            "steps": [{"pass": "prune_heads", "share": 0.5}, {"pass": "quantize_int8"}],
            "targets": [{"target": "pytorch"}],
            "validation": {"rounds": 3, "calls": 1},
        }
    )
    report, code = pipeline.export(recipe, tmp_path / "out", force=False, progress=QUIET)
    assert code == 0
    assert report.steps[0].macs.after < report.steps[0].macs.before
    assert report.steps[1].parameter_count.before == report.steps[0].parameter_count.after
    assert report.targets[0].fidelity[0].relative_l2 > 0.01


def test_a_missed_gate_ends_in_1_and_an_unmeasured_one_in_3(tmp_path: Path) -> None:
    for gate, target, code in (
        ("fidelity.cosine >= 0.999999999", "onnxruntime", 1),
        ("tensorrt_rtx: latency.ratio <= 1", "tensorrt_rtx", 3),  # not run, or from too few samples
        ("quality.judged_as_asked >= 0.9", "onnxruntime", 3),
    ):
        recipe = make(
            {
                "model": "dit:tiny",
                "gates": [gate],
                "steps": [{"pass": "quantize_int8"}],
                "targets": [{"target": target}],
                "validation": {"rounds": 3, "calls": 1},
            }
        )
        report, found = pipeline.export(recipe, tmp_path / gate[:8], force=True, progress=QUIET)
        assert found == code, gate
        assert report.verdict != "met" or code == 0


def test_a_target_that_cannot_be_built_ends_in_3_before_work_and_the_rest_is_finished_if_it_is_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no = Answer(False, "made so by this test")
    able = Availability(installed=Answer(True), importable=Answer(True), buildable=no, runnable=no)
    monkeypatch.setattr(TensorRtRtx, "availability", lambda self: able)
    content = {"model": "dit:tiny", "validation": {"rounds": 3, "calls": 1}}

    def asked(optional: bool) -> object:
        targets = [{"target": "tensorrt_rtx", "optional": optional}, {"target": "onnxruntime"}]
        return pipeline.export(make({**content, "targets": targets}), tmp_path / "out", force=False, progress=QUIET)

    with pytest.raises(UnavailableError, match="not buildable: made so by this test") as caught:
        asked(optional=False)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir())
    report, found = asked(optional=True)  # type: ignore[misc]
    assert found == 0
    assert report.targets[0].reason == "not buildable: made so by this test"
    assert report.targets[1].fidelity
    assert (tmp_path / "out" / "engines" / "onnxruntime").is_dir()
    assert not (tmp_path / "out" / "engines" / "tensorrt_rtx").exists()


def test_a_build_that_fails_ends_in_3_and_the_rest_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yes = Answer(True)
    able = Availability(installed=yes, importable=yes, buildable=yes, runnable=Answer(False, "no GPU in this test"))
    monkeypatch.setattr(TensorRtRtx, "availability", lambda self: able)

    def refuse(self: TensorRtRtx, graph: object, folder: Path) -> None:
        raise ToolchainError("the parser refuses these operators: Made")

    monkeypatch.setattr(TensorRtRtx, "build", refuse)
    targets = [{"target": "tensorrt_rtx"}, {"target": "onnxruntime"}]
    recipe = make({"model": "dit:tiny", "targets": targets, "validation": {"rounds": 3, "calls": 1}})
    report, found = pipeline.export(recipe, tmp_path / "out", force=False, progress=QUIET)
    assert found == 3
    assert "refuses these operators" in report.targets[0].reason
    assert report.targets[1].fidelity


def test_built_but_not_runnable_is_not_measured_and_never_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yes, no = Answer(True), Answer(False, "no GPU in this test")
    able = Availability(installed=yes, importable=yes, buildable=yes, runnable=no)
    monkeypatch.setattr(TensorRtRtx, "availability", lambda self: able)
    recipe = make({"model": "dit:tiny", "targets": [{"target": "tensorrt_rtx"}]})
    report, code = pipeline.export(recipe, tmp_path / "out", force=False, progress=QUIET)
    assert code == 0
    assert report.verdict == "not_measured"
    assert report.targets[0].built
    assert report.targets[0].latency is None
    assert "no GPU in this test" in report.targets[0].reason


def test_an_original_that_is_not_finite_is_refused_with_its_layer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = sources.load

    def spoiled(*args: object, **more: object) -> object:
        model = real(*args, **more)  # type: ignore[arg-type]
        with torch.no_grad():
            model.module.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(sources, "load", spoiled)
    with pytest.raises(ToolchainError, match=r"cannot be a reference(.|\n)*blocks\.1\.mlp\.fc1"):
        pipeline.export(make({"model": "dit:tiny"}), tmp_path / "out", force=False, progress=QUIET)
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_not_finite_is_a_fault_with_its_layer_and_never_green(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from enginewright.passes.quantization.quantize_int8 import QuantizeInt8

    real = QuantizeInt8.rewrite

    def spoiled(self: QuantizeInt8, model: torch.nn.Module, plan: Plan) -> torch.nn.Module:
        model = real(self, model, plan)
        if "blocks.1.mlp.fc1" in plan.choice:
            model.blocks[1].mlp.fc1.weight_scale.fill_(float("inf"))
        return model

    monkeypatch.setattr(QuantizeInt8, "rewrite", spoiled)
    recipe = make(
        {
            "model": "dit:tiny",
            "gates": ["fidelity.cosine >= 0.5"],
            "steps": [{"pass": "quantize_int8"}],
            "targets": [{"target": "onnxruntime", "int8": "dynamic"}],  # its static kernel ignores an infinite scale
        }
    )
    report, code = pipeline.export(recipe, tmp_path / "out", force=False, progress=QUIET)
    assert code == 1
    assert report.verdict == "missed"
    assert "blocks.1.mlp.fc1" in report.targets[0].faults[0]
    assert report.gates[0].verdict != "met"


def test_a_failing_step_names_itself_and_those_before_it() -> None:
    recipe = make(
        {
            "model": "dit:tiny",
            "steps": [{"pass": "prune_heads"}, {"pass": "quantize_int8", "exclude": ["nothing.like.this"]}],
        }
    )
    with pytest.raises(ToolchainError, match=r"step 2 \(quantize_int8\); steps before it: prune_heads"):
        pipeline.decide(recipe, QUIET)


def test_exit_code_of_a_report_without_gates_is_0(artifact: Path) -> None:
    report = record.read(artifact / "report.json").model_copy(update={"gates": [], "verdict": "not_measured"})
    assert exit_code(report) == 0


def test_validation_inputs_are_not_the_calibration_inputs() -> None:
    from enginewright import calibration

    recipe = make({"model": "dit:tiny", "calibration": {"calls": 4}})
    model = sources.load("dit:tiny")
    fit = calibration.inputs(recipe, model)
    held = model.batches(8, recipe.head.seed + calibration.VALIDATION_SEED)
    assert len(fit) == 4
    assert not any(np.array_equal(a["x"].numpy(), b["x"]) for a in fit for b in held)


def test_a_thousand_calibration_calls_and_more_do_not_reach_the_validation_inputs() -> None:
    from enginewright import calibration
    from enginewright.ground.signature import InputSpec
    from enginewright.sources.contract import Model

    spec = InputSpec(name="x", shape=(2,))
    model = Model(name="m", module=torch.nn.Identity(), inputs=(spec,), outputs=("y",), weights="none")
    fit = calibration.made(model, 1100, 0)
    held = model.batches(8, calibration.VALIDATION_SEED)
    assert len({call["x"].tobytes() for call in fit}) == 1100
    assert not any(np.array_equal(a["x"], b["x"]) for a in fit for b in held)
    assert np.array_equal(fit[0]["x"], model.batches(1, calibration.CALIBRATION_SEED)[0]["x"])


def test_the_plan_on_disk_is_the_plan_in_the_report(artifact: Path) -> None:
    from enginewright.passes.contract import Plan

    text = (artifact / "plans" / "01-quantize_int8.json").read_text()
    assert (
        Plan.from_json(text).digest() == json.loads((artifact / "report.json").read_text())["steps"][0]["plan_digest"]
    )


def test_a_plan_that_was_edited_is_held_against_what_its_pass_declares(artifact: Path, tmp_path: Path) -> None:
    """Before anything is carried out; the message names the file, the layer and the field."""
    name = "plans/01-quantize_int8.json"
    written = json.loads((artifact / name).read_text())
    assert (written["pass"], written["decision_version"]) == ("quantize_int8", 1)
    path = next(iter(written["choice"]))
    run = Run(read(artifact / "recipe.toml"), QUIET)
    (tmp_path / "plans").mkdir()
    for change, message in (
        ({"input_scal": 0.1}, "a decision of quantize_int8 has no setting 'input_scal'"),
        ({"input_scale": "0.1"}, "input_scale is '0.1'; it must be a number"),
    ):
        choice = {**written["choice"], path: {**written["choice"][path], **change}}
        (tmp_path / name).write_text(json.dumps({**written, "choice": choice}))
        with pytest.raises(ToolchainError, match=message) as caught:
            replay(run, tmp_path)
        assert caught.value.where == f"{tmp_path / name}: choice.{path}.{next(iter(change))}"


def test_sizes_to_time_at_are_checked_before_any_work(tmp_path: Path) -> None:
    recipe = make({"model": "dit:tiny", "validation": {"batch": {"batch": 99, "bach": 2}}})
    with pytest.raises(ToolchainError) as caught:
        pipeline.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    assert "batch is 99; the model takes 1 to " in str(caught.value)
    assert "no dynamic dimension named 'bach'" in str(caught.value)


def test_steps_that_change_the_reference_are_named_in_the_report(artifact: Path) -> None:
    assert pipeline.said_of_reference(["fold_adapters", "merge_models"]) == (
        "the original as fold_adapters and merge_models rewrote it"
    )
    run = Run(
        make({"model": "dit:tiny", "steps": [{"pass": "prune_heads"}, {"pass": "fix_inputs", "inputs": {"y": 1}}]}),
        QUIET,
    )
    run.optimize()
    assert run.state.intents == ("fix_inputs",)
    assert record.read(artifact / "report.json").validation["reference"] == "the untouched original"


def test_a_step_that_rewrites_its_own_reference_does_not_pass_by_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from enginewright.passes.pruning.prune_heads import PruneHeads

    monkeypatch.setattr(PruneHeads, "intended", lambda self, model, plan, context: self.rewrite(share(model), plan))
    recipe = make(
        {
            "model": "dit:tiny",
            "gates": ["fidelity.relative_l2 <= 0.0001"],  # three quarters of the heads are far more than that
            "steps": [{"pass": "prune_heads", "share": 0.75}],
            "targets": [{"target": "pytorch"}],
            "validation": {"rounds": 3, "calls": 1},
        }
    )
    report, _ = pipeline.export(recipe, tmp_path / "out", force=False, progress=QUIET)
    assert report.steps[0].changed
    assert report.validation["reference"] == "the untouched original"
    assert report.verdict == "missed"


def test_figures_are_given_against_what_is_intended_and_against_the_untouched_original(tmp_path: Path) -> None:
    recipe = make(
        {
            "model": "dit:tiny",
            "gates": ["fidelity.relative_l2 <= 0.0001", "fidelity_to_original.relative_l2 <= 0.0001"],
            "steps": [{"pass": "fix_inputs", "inputs": {"y": 1}}],
            "targets": [{"target": "onnxruntime"}, {"target": "pytorch"}],
            "validation": {"rounds": 3, "calls": 3},
        }
    )
    report, code = pipeline.export(recipe, tmp_path / "out", force=False, progress=QUIET)
    for target in report.targets:
        [intended], [original] = target.fidelity, target.fidelity_to_original
        assert intended.relative_l2 < 1e-4 < 1e-3 < original.relative_l2
    assert [gate.verdict for gate in report.gates] == ["met", "met", "missed", "missed"]
    assert code == 1
    page = (tmp_path / "out" / "report.md").read_text()
    assert "untouched original" in page


def test_without_an_intent_both_figures_are_one(artifact: Path) -> None:
    from enginewright.measure import value_of

    target = record.read(artifact / "report.json").targets[0]
    assert target.fidelity_to_original == []
    assert value_of("fidelity_to_original.cosine", target) == value_of("fidelity.cosine", target)


NET = """
import torch
from torch import nn
from enginewright import ModelSpec

def build(**more):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    return ModelSpec(module=net, inputs={"input": torch.randn(4, 64)}, **more)

def known():
    return build(ranges={"input": (-1, 1)})

def far():
    spec = build()
    spec.module[0].weight.data *= 5000.0
    spec.module[0].bias.data += 60_000.0
    spec.module[2].weight.data[:, 0] = 0.001
    return spec
"""


def of_net(folder: Path, name: str, **content: Any) -> tuple[record.Report, int]:
    (folder / "net.py").write_text(NET)
    asked = {"model": f"py:net.py:{name}", "validation": {"rounds": 3, "calls": 2}, "calibration": {"calls": 2}}
    recipe = make({**asked, **content}, folder=folder)
    return pipeline.export(recipe, folder / "out", force=True, progress=QUIET)


@pytest.mark.parametrize(("name", "wanted"), [("build", "inconclusive"), ("known", "met")])
def test_guessed_ranges_gate_nothing_for_static_8_bits(name: str, wanted: str, tmp_path: Path) -> None:
    report, code = of_net(
        tmp_path,
        name,
        gates=["fidelity.cosine >= 0.5"],
        steps=[{"pass": "quantize_int8", "smallest": 0}],
        targets=[{"target": "onnxruntime", "int8": "static"}],
    )
    assert [gate.verdict for gate in report.gates] == [wanted]
    assert code == (0 if wanted == "met" else 3)
    assert ("guessed ranges of input" in report.targets[0].doubt) == (wanted != "met")


def test_dynamic_scales_and_plain_exports_rest_on_no_guess(tmp_path: Path) -> None:
    dynamic = {"target": "onnxruntime", "int8": "dynamic"}
    gates = ["fidelity.cosine >= 0.5"]
    report, _ = of_net(tmp_path, "build", gates=gates, steps=[{"pass": "quantize_int8"}], targets=[dynamic])
    assert [gate.verdict for gate in report.gates] == ["met"]
    report, _ = of_net(tmp_path, "build", gates=gates, targets=[{"target": "onnxruntime"}])
    assert [gate.verdict for gate in report.gates] == ["met"]


def test_an_export_in_half_is_judged_in_true_half_precision(tmp_path: Path) -> None:
    gates = ["fidelity.relative_l2 <= 1e-5"]
    targets = [{"target": "onnxruntime"}]
    report, _ = of_net(tmp_path, "build", gates=gates, targets=targets, export={"dtype": "float16"})
    [half] = report.targets[0].fidelity_in_half
    assert 1e-4 < half.relative_l2 < 0.05
    assert report.gates[0].verdict == "missed"
    assert report.gates[0].value >= half.relative_l2
    assert "in true half precision" in (tmp_path / "out" / "report.md").read_text()
    plain, _ = of_net(tmp_path, "build", gates=gates, targets=targets)
    assert plain.targets[0].fidelity_in_half == []


def test_what_overflows_in_half_is_a_fault_though_a_cpu_computes_it(tmp_path: Path) -> None:
    report, code = of_net(tmp_path, "far", targets=[{"target": "onnxruntime"}], export={"dtype": "float16"})
    assert code == 1
    assert any("half precision" in fault for fault in report.targets[0].faults)
