"""A pipeline as one artifact: a folder a part, one report, and its whole job run by all engines together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import enginewright
from enginewright import artifact, pipeline, sources, whole
from enginewright.ground.errors import ToolchainError
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.sources.jobs import Job
from tests.shared import made_once
from tests.toolchain.sources import tiny_diffusers as tiny

pytest.importorskip("diffusers")
Command = Callable[..., CompletedProcess[str]]
PROMPT = "a red door"
JOB = {"steps": 2, "prompts": [PROMPT], "arguments": {"height": 64, "width": 64}}
GATES = ["whole.onnxruntime: fidelity.cosine >= 0.99", "unet.onnxruntime: fidelity.cosine >= 0.999"]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline of diffusers. Read only."""

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        tiny.stable_diffusion(folder / "sd")

    return made_once(tmp_path_factory, "pipeline", write) / "sd"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Path:
    """Its artifact. Read only."""
    return made_once(tmp_path_factory, "whole", lambda folder: export(pipeline_folder, folder / "out")) / "out"


def export(pipeline_folder: Path, place: Path) -> None:
    """The artifact of the pipeline, with its denoiser in 8 bits."""
    recipe = make(
        {
            "model": f"diffusers:{pipeline_folder}",
            "gates": GATES,
            "job": JOB,
            "calibration": {"calls": 2},
            "validation": {"calls": 2, "rounds": 3, "threads": 1},
            "steps": [{"pass": "quantize_int8", "parts": ["unet"]}],
            "targets": [{"target": "onnxruntime"}],
        }
    )
    _, code = whole.export(recipe, place, force=False, progress=Progress(quiet=True))
    assert code == 0


PARTS = ["unet", "text_encoder", "vae_decoder", "vae_encoder"]


def test_each_part_is_an_artifact_and_the_whole_one_report(out: Path) -> None:
    report = record.read(out / "report.json")
    assert [part.name for part in report.parts] == PARTS
    assert report.verdict == "met"
    assert {gate.target for gate in report.gates} == {"whole.onnxruntime", "unet.onnxruntime"}
    assert [(step.part, step.name) for step in report.steps] == [("unet", "quantize_int8")]
    assert report.steps[0].changed
    assert report.model.bytes == sum(part.model.bytes for part in report.parts)
    for part in PARTS:
        own = record.read(out / part / "report.json")
        assert artifact.read_manifest(out / part)["files"]
        target = next(each for each in report.targets if each.name == f"{part}.onnxruntime")
        assert target.fidelity == own.targets[0].fidelity
        assert all((out / path).stat().st_size == size for path, size in target.files.items())
    whole_target = report.targets[0]
    assert whole_target.bytes == sum(t.bytes or 0 for t in report.targets[1:])
    assert whole_target.latency is not None
    assert whole_target.latency.threads == 1, "as the recipe says, whatever this machine has"
    assert 0 < whole_target.fidelity[0].relative_l2 < 0.1  # the 8-bit network is seen in the pictures
    assert report.samples[0].target == "whole.onnxruntime"
    assert "vae_encoder takes no part in the whole job" in report.notes
    page = (out / "report.html").read_text()
    assert all(name in page for name in ("whole.onnxruntime", "vae_decoder.onnxruntime", "unet: quantize_int8"))


def test_the_pipeline_runs_on_the_engines_and_as_it_was_compared(out: Path, pipeline_folder: Path) -> None:
    def picture(pipe: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 2, "generator": generator, "output_type": "np", **JOB["arguments"]}  # type: ignore[dict-item]
        return np.asarray(pipe(PROMPT, **settings).images, np.float64)

    from enginewright.sources.diffusers_jobs import loaded

    original = picture(loaded(pipeline_folder))
    pipe = enginewright.load_pipeline(out, "onnxruntime")
    assert {type(each).__name__ for each in (pipe.unet, pipe.text_encoder, pipe.vae.decode)} == {"Engine"}
    error = np.linalg.norm(picture(pipe) - original) / np.linalg.norm(original)
    told = record.read(out / "report.json").targets[0].fidelity[0].relative_l2
    assert error == pytest.approx(told, rel=1e-3)
    assert type(loaded(pipeline_folder).unet).__name__ == "UNet2DConditionModel"  # the original's own stayed


def test_an_artifact_of_several_networks_names_them_where_one_is_wanted(out: Path) -> None:
    with pytest.raises(ToolchainError, match="holds several networks") as caught:
        enginewright.load(out)
    assert str(out / "unet") in str(caught.value.help)
    with pytest.raises(ToolchainError, match="holds one network"):
        enginewright.load_pipeline(out / "unet")


def test_it_is_checked_against_a_baseline_replaced_with_force_and_damage_is_seen(
    out: Path, tmp_path: Path, enginewright: Command
) -> None:
    out = Path(shutil.copytree(out, tmp_path / "out"))
    baseline = tmp_path / "baseline.json"
    assert enginewright("check", str(out), "--baseline", str(baseline), "--update").returncode == 0
    figures = json.loads(baseline.read_text())["figures"]
    assert "whole.onnxruntime/fidelity.cosine/pictures" in figures
    assert figures["unet/bytes"]["value"] < figures["unet/parameter_count"]["value"] * 4
    assert enginewright("check", str(out), "--baseline", str(baseline)).returncode == 0
    assert enginewright("report", str(out / "unet")).returncode == 0
    again = enginewright("export", "diffusers:elsewhere/sd", "-o", str(out))
    assert again.returncode == 2
    assert "the output folder 'out' exists" in again.stderr
    assert artifact.strange_in(out) == ""
    (out / "unet" / "mine.txt").write_text("of the user")
    assert "unet/mine.txt" in artifact.strange_in(out)
    (out / "unet" / "mine.txt").unlink()
    manifest = out / "unet" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(before + " ")
    with pytest.raises(ToolchainError, match=r"unet/manifest\.json was changed"):
        artifact.read_manifest(out)
    manifest.write_text(before)


def test_the_recipe_of_the_whole_and_those_of_parts_run_again(out: Path, tmp_path: Path) -> None:
    from enginewright.recipe import read

    again = read(out / "recipe.toml")
    assert again.only == (("unet",),)
    assert again.head.job is not None
    assert again.head.job.prompts == (PROMPT,)
    assert Path(again.model.removeprefix("diffusers:")).is_dir()
    part = read(out / "unet" / "recipe.toml")
    assert [str(gate) for gate in part.gates] == ["onnxruntime: fidelity.cosine >= 0.999"]
    assert read(out / "vae_decoder" / "recipe.toml").steps == ()


def test_a_job_that_cannot_be_run_is_said_and_fails_no_gate_of_others(tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    folder = tmp_path / "dit"
    diffusers.DiTPipeline(
        transformer=tiny.shaken(tiny.dit()), vae=tiny.shaken(tiny.autoencoder()), scheduler=diffusers.DDIMScheduler()
    ).save_pretrained(folder)
    content = {
        "model": f"diffusers:{folder}",
        "gates": ["transformer.onnxruntime: fidelity.cosine >= 0.999"],
        "validation": {"calls": 1, "rounds": 3, "threads": 1},
        "targets": [{"target": "onnxruntime"}],
    }
    report, code = whole.export(make(content), tmp_path / "out", force=False, progress=Progress(quiet=True))
    # Its network knows 10 classes, and the pipeline's guidance asks for number 1000.
    assert "does not run: IndexError" in report.targets[0].reason
    assert report.targets[0].latency is None
    assert (report.verdict, code) == ("met", 0)
    asking = make({**content, "job": {"arguments": {"colour": 1}}})
    target = report.targets[0]
    told, pictures = whole.try_job(asking, [target], tmp_path / "out", [], Progress(quiet=True), trust_code=False)
    assert "DiTPipeline takes no 'colour'" in target.reason
    assert (told, pictures) == ([target.reason], [])
    with pytest.raises(ToolchainError, match="draws classes and reads no texts"):
        sources.job_of(f"diffusers:{folder}", prompts=("a door",), steps=1, arguments={})


def test_the_whole_job_runs_on_the_recipes_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def load(folder: Path, target: str, *, threads: int | None, trust_code: bool) -> SimpleNamespace:
        asked.append(threads)
        return SimpleNamespace(runner=None)

    monkeypatch.setattr(whole, "load", load)
    job = Job(parts=("a",), calls=(), assemble=dict, run=lambda made: lambda call: call, models={"a": "dit:tiny"})
    whole.engines(job, Path(), "whole.onnxruntime", threads=3, trust_code=False)
    assert asked == [3]
    assert whole.originals(job, 3)["a"].threads == 3  # type: ignore[attr-defined]
    assert make({"model": "dit:tiny", "validation": {"threads": 3}}).threads == 3


def test_networks_that_do_nothing_together_have_no_job() -> None:
    with pytest.raises(ToolchainError, match="source 'onnx' has no whole job"):
        sources.job_of("onnx:net.onnx", prompts=(), steps=1, arguments={})


def test_a_gate_on_a_job_that_was_not_run_is_not_met() -> None:
    target = record.TargetRecord(
        name="whole.onnxruntime",
        parameters={},
        **dict.fromkeys(("installed", "importable", "buildable", "runnable", "built"), True),
    )
    recipe = make({"model": "dit:tiny", "targets": [{"target": "onnxruntime"}], "gates": GATES[:1]})
    report = whole.report_of(recipe, {}, [target], [], [], 0.0)
    assert report.verdict == "not_measured"
    assert pipeline.exit_code(report) == 3


def test_a_faulty_whole_job_is_missed_though_no_gate_asks() -> None:
    able = dict.fromkeys(("installed", "importable", "buildable", "runnable", "built"), True)
    target = record.TargetRecord(name="whole.onnxruntime", part="whole", parameters={}, faults=["not finite"], **able)
    report = whole.report_of(make({"model": "dit:tiny"}), {}, [target], [], [], 0.0)
    assert (report.verdict, pipeline.exit_code(report)) == ("missed", 1)


def test_parts_are_planned_each_with_its_own_steps(pipeline_folder: Path) -> None:
    decisions = enginewright.plan(
        f"diffusers:{pipeline_folder}",
        [
            {"pass": "quantize_int8", "parts": ["unet"]},
            {"pass": "quantize_int8", "parts": ["text_encoder"], "smallest": 64},
        ],
        calibration={"calls": 2},
    )
    assert [decision.step.label for decision in decisions] == ["unet: quantize_int8", "text_encoder: quantize_int8"]


def test_what_is_for_a_part_that_is_not_there_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    text = f"diffusers:{pipeline_folder}"

    def refused(**content: Any) -> str:
        recipe = make({"model": text, "targets": [{"target": "onnxruntime"}], **content})
        with pytest.raises(ToolchainError) as caught:
            whole.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
        assert not (tmp_path / "out").exists()
        return f"{caught.value.message} {caught.value.help}"

    assert "there is no part named 'unit'" in refused(steps=[{"pass": "quantize_int8", "parts": ["unit"]}])
    assert "unet" in refused(gates=["unit.onnxruntime: fidelity.cosine >= 0.9"])
    for content in (
        {"steps": [{"pass": "quantize_int8", "parts": ["unet"]}]},
        {"gates": ["whole.onnxruntime: fidelity.cosine >= 0.9"]},
        {"job": {"steps": 2}},
    ):
        assert "no pipeline" in refused(model="dit:tiny", **content)
    with pytest.raises(ToolchainError, match="it is an array of names"):
        make({"model": text, "steps": [{"pass": "quantize_int8", "parts": "unet"}]})
    with pytest.raises(ToolchainError, match="a recipe can hold it once"):
        make({"model": text, "steps": [{"pass": "quantize_int8", "parts": ["unet"]}, {"pass": "quantize_int8"}]})
