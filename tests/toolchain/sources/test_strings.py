from __future__ import annotations

from pathlib import Path

import pytest

from enginewright import sources
from enginewright.ground.errors import ToolchainError
from enginewright.sources import short_name, with_path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("dit:digits", "dit:digits"),
        ("py:net.py:build", "py:<net.py>:build"),
        ("onnx:sub/net.onnx", "onnx:<sub/net.onnx>"),
        ("onnx:/abs/net.onnx", "onnx:</abs/net.onnx>"),
        ("hf:here", "hf:<here>"),
        ("hf:owner/name", "hf:owner/name"),
        ("hf:here#encoder?sequence=1..8", "hf:<here>#encoder?sequence=1..8"),
        ("hf:here?size=64", "hf:<here>?size=64"),
        ("hf:owner/name?size=64", "hf:owner/name?size=64"),
        ("diffusers:here", "diffusers:<here>"),
        ("diffusers:here#unet", "diffusers:<here>#unet"),
        ("diffusers:owner/name#unet", "diffusers:owner/name#unet"),
    ],
)
def test_paths_are_found_in_model_strings(
    text: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    known = ["diffusers", "hf", "onnx", "py"]
    monkeypatch.setattr("enginewright.sources.prefixes", lambda: known)
    assert with_path(text, tmp_path, lambda path: f"<{path}>") == wanted


def test_reports_call_a_model_by_its_last_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert short_name(f"hf:{tmp_path}/mine") == "hf:mine"
    assert short_name(f"diffusers:{tmp_path}/mine/#unet") == "diffusers:mine#unet"
    assert short_name(f"onnx:{tmp_path}/net.onnx") == "onnx:net.onnx"
    assert short_name("hf:owner/name") == "hf:owner/name"
    assert short_name("dit:digits") == "dit:digits"


def test_a_user_that_there_is_not_is_no_traceback() -> None:
    for text in ("~0", "~nobody-of-that-name/model", "hf:~0/model", "diffusers:~0"):
        with pytest.raises(ToolchainError):
            sources.load(text)
