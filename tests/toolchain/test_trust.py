"""What an artifact names is not run because the artifact is opened."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import enginewright
from enginewright import artifact, pipeline, trust
from enginewright.cli import main
from enginewright.ground.errors import ToolchainError
from enginewright.opened import engines_of, open_subject, reopen
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.teachers import teacher_of

NET = """
from pathlib import Path
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Linear(8, 4), {"input": torch.zeros(3, 8)}
"""
MARK = 'Path(__file__).with_name("ran").touch()\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a Python file that lies in it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.py").write_text(NET)
    targets = [{"target": "onnxruntime"}, {"target": "pytorch"}]
    content = {"model": "py:net.py:build", "targets": targets, "validation": {"skip": True}}
    recipe = make(content, folder=folder)
    pipeline.export(recipe, folder / "out", force=False, progress=Progress(quiet=True))
    return folder / "out"


@pytest.fixture
def evil(made: Path, tmp_path: Path) -> Path:
    """The same, with a file of its own that leaves a mark when it runs, and digests that match."""
    out = tmp_path / "evil"
    shutil.copytree(made, out)
    code = (NET + MARK).encode()
    (out / "evil.py").write_bytes(code)
    (out / "recipe.toml").write_text((out / "recipe.toml").read_text().replace("../net.py", "evil.py"))
    manifest = json.loads((out / "manifest.json").read_text())
    digest = hashlib.sha256(code).hexdigest()
    manifest["source"]["files"] = {".": {"bytes": len(code), "sha256": digest}}
    manifest["files"] = listed(out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def listed(folder: Path) -> dict[str, dict[str, object]]:
    """What a manifest says of the files of a folder: whoever makes one can sign it too."""
    left_out = {"manifest.json", *artifact.RENDERED}
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name not in left_out
    }


def told(text: str, out: Path) -> bool:
    return "code that opening it would run" in text and str(out / "evil.py:build") in text and "--trust-code" in text


@pytest.mark.parametrize(
    "open_it",
    [
        lambda out: open_subject(str(out)),
        lambda out: open_subject(f"{out}#onnxruntime"),
        lambda out: enginewright.load_module(out),
        lambda out: enginewright.load_module(out, source=out / "evil.py"),
        lambda out: enginewright.load(out, "pytorch"),
        lambda out: teacher_of(out.name, make({"model": "dit:tiny"}, folder=out.parent)),
    ],
    ids=["bench", "one engine", "load_module", "load_module, source", "load pytorch", "teacher"],
)
def test_opening_an_artifact_runs_nothing_that_it_names(evil: Path, open_it: Callable[[Path], object]) -> None:
    with pytest.raises(ToolchainError) as caught:
        open_it(evil)
    assert told(str(caught.value), evil)
    assert caught.value.exit_code == 2
    assert not (evil / "ran").exists()


def test_commands_ask_for_the_flag_and_name_what_would_run(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["bench", str(evil), "--rounds", "3"], ["compare", str(evil), str(evil)]):
        assert main(command) == 2
        assert told(capsys.readouterr().err, evil)
    assert main(["check", str(evil), "--baseline", str(evil.parent / "b.json"), "--update"]) == 0
    assert main(["report", str(evil)]) == 0
    assert not (evil / "ran").exists()
    assert main(["compare", str(evil), str(evil), "--trust-code"]) == 0
    assert (evil / "ran").exists()


def test_trust_in_python(evil: Path) -> None:
    assert isinstance(enginewright.load_module(evil, trust_code=True), torch.nn.Linear)
    call = torch.ones(2, 8)
    given = [enginewright.load(evil, target, trust_code=True)(call) for target in ("onnxruntime", "pytorch")]
    torch.testing.assert_close(*given)


def test_an_engine_needs_no_trust(evil: Path) -> None:
    assert enginewright.load(evil)(torch.zeros(2, 8)).shape == (2, 4)
    assert not (evil / "ran").exists()


def test_a_recipe_may_not_give_itself_trust_in_remote_code(made: Path, tmp_path: Path) -> None:
    text = (made / "recipe.toml").read_text().replace("py:../net.py:build", "hf:someone/model")
    (tmp_path / "recipe.toml").write_text(text.replace("trust_remote_code = false", "trust_remote_code = true"))
    manifest = artifact.read_manifest(made)
    changed = {"files": listed(tmp_path), "source": {"local": 0, "files": {}}}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **changed}))
    with pytest.raises(ToolchainError, match=r"'hf:someone/model' brings along \(trust_remote_code = true\)"):
        enginewright.load_module(tmp_path)


def test_a_recipe_in_an_artifact_says_what_it_runs_and_runs_it(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Running a recipe is the user's own act, and the file that is named is what is run."""
    assert main(["plan", str(evil / "recipe.toml"), "--quiet"]) == 0
    assert f"the recipe of this artifact runs code: {evil / 'evil.py'}:build" in capsys.readouterr().err
    assert (evil / "ran").exists()


def test_code_of_steps_is_named_too(tmp_path: Path) -> None:
    steps = [{"pass": "prune_depth", "score": "score.py:closeness"}]
    recipe = make({"model": "dit:tiny", "steps": steps}, folder=tmp_path)
    assert trust.recipe_code(recipe) == [f"{tmp_path}/score.py:closeness"]
    assert trust.model_code(recipe) == []


def test_a_teacher_whose_source_was_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    recipe = make({"model": "py:net.py:build", "validation": {"skip": True}}, folder=tmp_path)
    pipeline.export(recipe, tmp_path / "taught", force=False, progress=Progress(quiet=True))
    assert teacher_of("taught", recipe, trust_code=True) is not None
    (tmp_path / "net.py").write_text(NET.replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(ToolchainError, match="another SHA-256"):
        teacher_of("taught", recipe, trust_code=True)


def test_classes_that_an_interface_names_are_modules_and_outputs(made: Path) -> None:
    engine = enginewright.load(made)
    for returns in ("transformers.utils:logging", "transformers:set_seed"):
        object.__setattr__(engine.interface, "returns", returns)
        with pytest.raises(ToolchainError, match="refused"):
            engine(torch.zeros(2, 8))
    object.__setattr__(engine.interface, "original", "transformers:set_seed")
    with pytest.raises(AttributeError, match="refused"):
        _ = engine.config


@pytest.fixture
def compiled(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """An artifact that says its first engine is a compiled package; what was loaded as one."""
    out, loaded = tmp_path / "compiled", list[str]()
    shutil.copytree(made, out)
    shutil.copy(made.parent / "net.py", tmp_path)
    head = (out / "recipe.toml").read_text().partition("[[targets]]")[0]
    targets = [f'[[targets]]\ntarget = "{name}"\n' for name in ("aot_inductor", "onnxruntime")]
    (out / "recipe.toml").write_text("\n".join([head, *targets]))
    (out / "engines" / "aot_inductor").mkdir()
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "files": listed(out)}))

    def load(target: object, folder: Path, **more: object) -> Callable[[dict[str, object]], dict[str, object]]:
        loaded.append(folder.name)
        return lambda inputs: {"output": torch.full((2, 4), 7.0).numpy()}

    monkeypatch.setattr("enginewright.targets.aot_inductor_engine.AotInductor.load", load)
    return out, loaded


def test_native_code_of_an_artifact_is_loaded_only_where_it_is_trusted(compiled: tuple[Path, list[str]]) -> None:
    out, loaded = compiled
    for open_it in (
        lambda: enginewright.load(out, "aot_inductor"),
        lambda: open_subject(f"{out}#aot_inductor"),
    ):
        with pytest.raises(ToolchainError, match="aot_inductor is native code that the artifact brings") as caught:
            open_it()
        assert "--trust-code" in str(caught.value.help)
        assert caught.value.exit_code == 2
    assert loaded == []
    assert enginewright.load(out, "aot_inductor", trust_code=True)(torch.zeros(2, 8))[0, 0] == 7
    assert loaded == ["aot_inductor"]


def test_an_engine_that_is_no_code_runs_beside_one_that_is_and_the_reason_is_told(
    compiled: tuple[Path, list[str]],
) -> None:
    out, loaded = compiled
    assert enginewright.load(out)(torch.zeros(2, 8)).shape == (2, 4)
    run = reopen(out)
    runners, absent = engines_of(run, out, "", 1)
    assert "onnxruntime" in runners
    assert "native code that the artifact brings" in absent["aot_inductor"]
    assert "--trust-code" in absent["aot_inductor"]
    assert loaded == []
