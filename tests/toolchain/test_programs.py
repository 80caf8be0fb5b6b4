"""Artifacts of several networks, all the way into engines and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import enginewright
from enginewright import pipeline
from enginewright.ground.errors import ToolchainError
from enginewright.models.blocks.decoding import greedy
from enginewright.opened import open_subject
from enginewright.passes.contract import macs
from enginewright.passes.networks import Networks, networks_of, program_of
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.validation.inputs import draw

HOIST = {"pass": "hoist_constants", "constant": ["y"]}
SLICE = {"pass": "slice_width_by_timestep", "importance": "activation", "steps": 6, "buckets": 2}
REUSE = {"pass": "reuse_blocks", "interval": 3, "steps": 4}
BLOCKS = {"pass": "mixture_of_blocks", "buckets": 2}
INT8 = {"pass": "quantize_int8", "smallest": 0}


def exported(out: Path, *steps: dict[str, Any], **more: Any) -> Path:
    """An artifact of a model, by default ``dit:tiny``, after these steps, for ONNX Runtime and PyTorch."""
    content = {
        "model": "dit:tiny",
        "steps": list(steps),
        "targets": [{"target": "onnxruntime"}, {"target": "pytorch"}],
        "validation": {"rounds": 3, "calls": 2},
        "calibration": {"calls": 2},
    }
    _, code = pipeline.export(make(content | more), out, force=False, progress=Progress(quiet=True))
    assert code == 0
    return out


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(
        tmp_path_factory.mktemp("sliced") / "out",
        {"pass": "slice_width_by_timestep", "importance": "activation", "steps": 6, "buckets": 2},
    )


def test_the_artifact_holds_an_engine_for_each_stretch(sliced: Path) -> None:
    program = json.loads((sliced / "program.json").read_text())
    assert program["table"]["input"] == "t"
    assert program["table"]["timesteps"] == [999, 799, 599, 400, 200, 0]
    assert set(program["table"]["ways"]) == {0, 1}
    files = json.loads((sliced / "manifest.json").read_text())["files"]
    assert {"program.json", "model-0.onnx", "model-1.onnx"} <= files.keys()
    names = {"onnxruntime-0", "onnxruntime-1", "pytorch"}
    assert {path.name for path in (sliced / "engines").iterdir()} == names
    step = record.read(sliced / "report.json").steps[0]
    assert step.macs.after < 0.75 * step.macs.before


def test_engines_and_module_agree_for_rows_of_any_timestep(sliced: Path) -> None:
    opened = open_subject(str(sliced))
    call = draw(opened.inputs, seed=5, sizes={"batch": 4})
    call["t"] = np.asarray([0, 999, 250, 700], np.float32)
    module = enginewright.load_module(sliced)
    assert isinstance(module, Networks)
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(array) for name, array in call.items()}).numpy()
    for name in ("onnxruntime", "pytorch"):
        found = opened.runners[name](call)["prediction_and_variance"]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    engine = enginewright.load(sliced, "onnxruntime")
    np.testing.assert_allclose(engine(**call), wanted, atol=1e-5)


@pytest.fixture(scope="module")
def reused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("reused") / "out", REUSE)


def test_engines_that_reuse_keep_the_signature_and_walk_as_the_module_does(reused: Path) -> None:
    program = json.loads((reused / "program.json").read_text())
    table = program["table"]
    assert (table["ways"], program["states"][0]["shape"]) == ([0, 1, 1, 0], [16, 32])
    module = enginewright.load_module(reused)
    engines = [enginewright.load(reused, name) for name in ("onnxruntime", "pytorch")]
    assert [spec.name for spec in engines[0].inputs] == ["x", "t", "y"]
    call = {name: torch.from_numpy(array) for name, array in draw(engines[0].inputs, seed=5).items()}
    moved = []
    for t in table["timesteps"]:
        call["t"] = torch.full_like(call["t"], t)
        with torch.no_grad():
            wanted = module(**call)
            moved.append(not torch.equal(wanted, networks_of(module)["whole"](**call)[0]))
        for engine in engines:
            torch.testing.assert_close(engine(**call), wanted, atol=1e-5, rtol=0)
    assert moved == [False, True, True, False]
    assert "reuse" in record.read(reused / "report.json").steps[0].notes[0]


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(
        tmp_path_factory.mktemp("parted") / "out",
        {"pass": "hoist_constants", "constant": ["t"]},
        gates=["fidelity.max_abs <= 1e-5"],
    )


def test_the_artifact_holds_two_engines_and_says_how_they_are_called(parted: Path) -> None:
    networks = json.loads((parted / "program.json").read_text())["networks"]
    assert networks["prepare"]["takes"] == ["t"]
    assert networks["step"]["takes"][:2] == ["x", "y"]
    files = json.loads((parted / "manifest.json").read_text())["files"]
    assert {"program.json", "model-prepare.onnx", "model-step.onnx", "model.safetensors"} <= files.keys()
    assert "model.onnx" not in files
    names = {"onnxruntime-prepare", "onnxruntime-step", "pytorch"}
    assert {path.name for path in (parted / "engines").iterdir()} == names


def test_the_report_tells_steps_from_preparing(parted: Path) -> None:
    report = record.read(parted / "report.json")
    (step,) = report.steps
    assert step.macs.before - step.macs.after == 256 * 32 + 32 * 32  # the two layers of t_embedder, for one row
    assert "needed once for a run of constant t" in step.notes[0]
    notes = {target.name: target.notes for target in report.targets}
    assert any("latency is of a step; preparing a run took" in note for note in notes["onnxruntime"])
    assert not any("preparing" in note for note in notes["pytorch"])
    assert all(target.latency for target in report.targets)


def test_engines_and_module_agree_at_any_batch(parted: Path) -> None:
    opened = open_subject(str(parted))
    module = enginewright.load_module(parted)
    assert program_of(module).hoisted
    engine = enginewright.load(parted, "onnxruntime")
    for rows in (1, 4):
        call = draw(opened.inputs, seed=rows, sizes={"batch": rows})
        with torch.no_grad():
            wanted = module(**{name: torch.from_numpy(array) for name, array in call.items()}).numpy()
        for name in ("onnxruntime", "pytorch"):
            np.testing.assert_allclose(opened.runners[name](call)["prediction_and_variance"], wanted, atol=1e-5)
        np.testing.assert_allclose(engine(**call), wanted, atol=1e-5)


TOGETHER = {
    "hoisted, then sliced": (HOIST, SLICE),
    "sliced, then hoisted": (SLICE, HOIST),
    "hoisted, then reused": (HOIST, REUSE),
    "reused, then hoisted": (REUSE, HOIST),
    "hoisted, then fewer blocks": (HOIST, BLOCKS),
    "fewer blocks, then hoisted": (BLOCKS, HOIST),
    "hoisted, sliced, in 8 bits": (HOIST, SLICE, INT8),
    "reused, hoisted, in 8 bits": (REUSE, HOIST, INT8),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_what_is_done_once_and_networks_by_timestep_go_together(case: str, tmp_path: Path) -> None:
    steps = TOGETHER[case]
    targets = [{"target": "onnxruntime", "int8": "static"}, {"target": "pytorch"}]
    out = exported(tmp_path / "out", *steps, targets=targets, calibration={"calls": 4})
    program = json.loads((out / "program.json").read_text())
    parts = [name.rpartition("-")[2] for name in program["networks"]]
    count = 1 if BLOCKS in steps else 2  # of the two blocks it has, both ranges of timesteps keep the same
    assert parts == ["prepare", "step"] * count, "each network prepares for itself"
    module = enginewright.load_module(out)
    opened = open_subject(str(out))
    timesteps = program["table"]["timesteps"] if program["table"] else [999, 0]
    for rows in (1, 3):
        call = draw(opened.inputs, seed=rows, sizes={"batch": rows})
        for label in (0, 1):  # what is prepared changes between runs
            call["y"] = np.full_like(call["y"], label)
            for t in timesteps:
                call["t"] = np.full_like(call["t"], t)
                with torch.no_grad():
                    wanted = module(**{name: torch.from_numpy(array) for name, array in call.items()}).numpy()
                for name in ("onnxruntime", "pytorch"):
                    found = opened.runners[name](call)["prediction_and_variance"]
                    np.testing.assert_allclose(found, wanted, atol=2e-2 if INT8 in steps else 1e-5)


def test_a_checkpoint_on_disk_is_parted_around_its_linked_weights(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "bert")
    recipe = make(
        {
            "model": f"hf:{tmp_path / 'bert'}",
            "steps": [{"pass": "hoist_constants", "constant": ["token_type_ids"]}],
            "targets": [{"target": "onnxruntime"}],
            "validation": {"skip": True},
            "calibration": {"calls": 1},
        }
    )
    out = tmp_path / "out"
    pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
    assert (out / "model-prepare.onnx").exists()
    assert list((out / "weights").iterdir()), "the weights lie where they lay"
    engine, module = enginewright.load(out), enginewright.load_module(out)
    call = draw(engine.inputs, seed=3, sizes={"batch": 3})
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(array) for name, array in call.items()})[0].numpy()
    np.testing.assert_allclose(engine(**call)[0], wanted, atol=1e-5)


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(
        tmp_path_factory.mktemp("in_turn") / "out", model="styleswin:tiny", gates=["fidelity.relative_l2 <= 1e-4"]
    )


def test_a_model_of_two_networks_becomes_two_engines_that_agree_with_it(in_turn: Path) -> None:
    program = json.loads((in_turn / "program.json").read_text())
    assert program["networks"]["synthesis"]["takes"] == ["ws"]
    assert program["inner"][0]["shape"][1:] == [6, 32]
    assert {path.name for path in in_turn.glob("*.onnx")} == {"model-mapping.onnx", "model-synthesis.onnx"}
    report = record.read(in_turn / "report.json")
    assert report.verdict == "met"
    assert {"model-mapping run in", "model-synthesis run in"} <= {
        " ".join(each.split()[:3]) for each in report.validation["graph"].split("; ") if each.startswith("model-")
    }
    module, opened = enginewright.load_module(in_turn), open_subject(str(in_turn))
    assert report.model.macs == macs(module, {"z": torch.zeros(1, 32)})
    for rows in (1, 5):
        call = draw(opened.inputs, seed=rows, sizes={"batch": rows})
        with torch.no_grad():
            wanted = module(**{name: torch.from_numpy(array) for name, array in call.items()}).numpy()
        assert wanted.std() > 0.01
        for runner in opened.runners.values():
            np.testing.assert_allclose(runner(call)["image"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "step",
    [
        {"pass": "hoist_constants", "constant": ["z"]},
        {"pass": "slice_width_by_timestep", "importance": "weights", "steps": 4, "buckets": 2},
        {"pass": "fix_inputs", "inputs": {"z": 0.0}},
    ],
    ids=lambda step: step["pass"],
)
def test_what_is_meant_for_one_network_is_refused_in_our_own_words(step: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ToolchainError):
        exported(tmp_path / "out", step, model="styleswin:tiny")


@pytest.mark.slow
def test_networks_in_turn_are_quantized_each_on_what_it_is_given(tmp_path: Path) -> None:
    targets = [{"target": "onnxruntime", "int8": "static"}, {"target": "pytorch"}]
    out = exported(tmp_path / "out", INT8, model="styleswin:tiny", targets=targets)
    changed = record.read(out / "report.json").steps[0].changed
    assert {path.split(".")[1] for path in changed} == {"mapping", "synthesis"}
    for target in record.read(out / "report.json").targets:
        assert target.fidelity[0].relative_l2 < 0.1, target.name


@pytest.mark.slow
def test_a_decoder_with_a_cache_is_one_engine_that_says_token_for_token_what_the_model_does(tmp_path: Path) -> None:
    out = exported(tmp_path / "out", model="vevo-decoder:tiny", gates=["quality.same_tokens >= 1"])
    program = json.loads((out / "program.json").read_text())
    assert (program["start"], [state["given_as"] for state in program["states"]]) == (
        "position",
        ["new_keys", "new_values"],
    )
    readme = (out / "README.md").read_text()
    assert "`new_keys` as `keys`" in readme
    assert '"keys": np.full((1, 2, 4, 64, 16), 0, dtype=np.float32)' in readme
    opened = open_subject(str(out))
    assert opened.original is not None
    prompt = draw(opened.inputs, seed=1, sizes={"batch": 2, "tokens": 9})
    wanted = greedy(opened.original, prompt["ids"], 20)
    assert len(np.unique(wanted)) > 3
    for runner in opened.runners.values():
        np.testing.assert_array_equal(greedy(runner, prompt["ids"], 20), wanted)
    engine = enginewright.load(out, "onnxruntime")
    with pytest.raises(ToolchainError, match="there is none before"):
        engine(ids=prompt["ids"][:, :1], position=np.asarray(3))
    assert engine(ids=prompt["ids"]).shape == (2, 76)
