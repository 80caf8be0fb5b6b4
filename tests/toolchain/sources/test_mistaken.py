"""What a newcomer types for a model, and the model string that comes back."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.sources.mistaken import mistaken


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with something of everything, which commands start in."""
    folders = {
        "my-model": {"config.json": {"model_type": "bert"}},
        "pipeline": {"model_index.json": {}},
        "network": {"config.json": {"_class_name": "UNet2DConditionModel"}},
        "sentences": {"modules.json": [], "config.json": {}},
        "lora": {"adapter_config.json": {"base_model_name_or_path": "google-bert/bert-base-uncased"}},
        "artifact": {"manifest.json": {}, "recipe.toml": ""},
        "empty": {},
        "checkpoint": {"config.json": {}, "model.safetensors": ""},
    }
    for folder, files in folders.items():
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_text(json.dumps(content))
    for name in ("model.pth", "model.bin", "model.gguf", "model.onnx", "model.pt2", "model.safetensors", "run.toml"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "net.py").write_text("def build():\n    pass\n\ndef larger():\n    pass\n\ndef _own():\n    pass\n")
    (tmp_path / "one.py").write_text("def build():\n    pass\n")
    (tmp_path / "broken.py").write_text("def build(:\n")
    for name, inside in (
        ("model.pt", "model/data.pkl"),
        ("script.pt", "s/code/x.py"),
        ("program.pt", "p/archive_format"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr(inside, b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "said", "write"),
    [
        ("./my-model", "checkpoint of transformers", "write hf:./my-model"),
        ("my-model", "checkpoint of transformers", "write hf:my-model"),
        ("my-model/config.json", "checkpoint of transformers", "write hf:my-model"),
        ("pipeline", "pipeline of diffusers", "write diffusers:pipeline"),
        ("network", "network of diffusers", "write diffusers:network"),
        ("sentences", "sentence encoder", "write hf:sentences"),
        (
            "lora",
            "adapter",
            "hf:google-bert/bert-base-uncased --pass fold_adapters:file=lora/adapter_model.safetensors",
        ),
        ("artifact", "artifact", "enginewright run artifact/recipe.toml"),
        ("empty", "no config.json", "save_pretrained"),
        ("checkpoint/model.safetensors", "weights of a model", "write hf:checkpoint"),
        ("google-bert/bert-base-uncased", "no such folder here", "hf:google-bert/bert-base-uncased"),
        ("https://huggingface.co/google-bert/bert-base-uncased/tree/main", "hub", "hf:google-bert/bert-base-uncased"),
        ("model.pt", "torch.save", "py:FILE.py:FUNCTION"),
        ("script.pt", "TorchScript", "py:FILE.py:FUNCTION"),
        ("program.pt", "exported program", "write pt2:program.pt"),
        ("model.pth", "torch.save", "py:FILE.py:FUNCTION"),
        ("model.bin", "torch.save", "py:FILE.py:FUNCTION"),
        ("model.gguf", "GGUF", "hf:FOLDER"),
        ("model.safetensors", "tensors", "--weights model.safetensors"),
        ("model.onnx", "ONNX file", "write onnx:model.onnx"),
        ("model.pt2", "exported program", "write pt2:model.pt2"),
        ("net.py", "Python file", "write py:net.py:FUNCTION; it has build, larger"),
        ("one.py", "Python file", "write py:one.py:build"),
        ("broken.py", "not Python", "mend it"),
        ("net.py:build", "lacks the name of its source", "write py:net.py:build"),
        ("run.toml", "recipe", "enginewright run run.toml"),
        ("./gone", "no file or folder './gone'", "check the path"),
        ("gone.pt", "no file or folder 'gone.pt'", "check the path"),
        ("HF:my-model", "no source named 'HF'", "hf:my-model"),
        ("diffuser:pipeline", "no source named 'diffuser'", "diffusers:pipeline"),
        ("dti:digits", "no model named 'dti:digits'", "did you mean 'dit'?"),
        ("binckpt", "no model named 'binckpt'", "py:FILE.py:FUNCTION"),
        ("\0", "can be no path", "hf:FOLDER"),
        ("x" * 5000, "can be no path", "hf:FOLDER"),
    ],
)
def test_a_model_without_its_source_is_answered_with_what_to_write(
    text: str, said: str, write: str, here: Path
) -> None:
    fault = mistaken(text, where="MODEL")
    assert fault is not None
    assert said in fault.message
    assert write in str(fault.help)
    assert fault.exit_code == 2
    assert len(str(fault)) < 600
    if not text.startswith("dti"):
        assert "did you mean 'dit'" not in str(fault)


@pytest.mark.parametrize("text", ["dit", "dit:digits", "hf:anything", "py:net.py:build", "diffusers:a/b#unet"])
def test_what_may_be_a_model_is_left_alone(text: str) -> None:
    assert mistaken(text) is None


def test_every_way_in_gives_the_same_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from enginewright.cli import main

    for command in (["export", "my-model"], ["plan", "./my-model"], ["show", "./my-model"], ["bench", "my-model"]):
        assert main([*command, *(("--against", "dit:tiny") if command[0] == "bench" else ())]) == 2
        assert f"write hf:{command[1]}" in capsys.readouterr().err, command
    assert main(["compare", "my-model", "dit:tiny"]) == 2
    assert "write hf:my-model" in capsys.readouterr().err
    with pytest.raises(ToolchainError, match="write hf:my-model"):
        sources.load("my-model")


def test_a_function_that_a_file_lacks_is_answered_with_those_it_has(here: Path) -> None:
    with pytest.raises(ToolchainError, match="did you mean 'build'"):
        sources.load("py:net.py:biuld")
    with pytest.raises(ToolchainError, match="known: _own, build, larger"):
        sources.load("py:net.py:zzzz")
    (here / "none.py").write_text("x = 1\n")
    with pytest.raises(ToolchainError, match="there is none at all"):
        sources.load("py:none.py:build")
