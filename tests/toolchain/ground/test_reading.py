"""Files that are no files, too deep, too large or not text: each is said in one sentence, and none is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from enginewright.ground import reading
from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import (
    LARGEST_TEXT,
    parse_json,
    read_json,
    read_setting,
    read_tensors,
    read_text,
    read_toml,
)


def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(ToolchainError, match=r"the recipe is no file: 'recipe.toml' is a pipe"):
        read_toml(tmp_path / "recipe.toml", what="the recipe")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"the plan (is no file|cannot be read)"):
        read_text(tmp_path, what="the plan")
    with pytest.raises(ToolchainError, match=r"the adapter is no file"):
        read_tensors(tmp_path, what="the adapter")


def test_a_file_larger_than_any_text_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)  # sparse
    with pytest.raises(ToolchainError, match=r"the report is larger than 64 MB"):
        read_json(tmp_path / "large.json", what="the report")


def test_a_path_with_a_nul_or_of_any_length_is_answered(tmp_path: Path) -> None:
    for path in (tmp_path / "a\0b", tmp_path / ("x" * 5_000)):
        with pytest.raises(ToolchainError, match=r"the recipe cannot be read"):
            read_text(path, what="the recipe")


def test_bytes_that_are_no_text_are_named_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(ToolchainError, match="not UTF-8 text: invalid start byte at byte 2"):
        read_text(tmp_path / "a", what="the recipe")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 100 levels"),
        ("[" * 200 + "]" * 200, "nested deeper than 100 levels"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested deeper than 100 levels"),
        ("9" * 5_000, "is not JSON: Exceeds the limit"),
        ("NaN", "NaN is no number in JSON"),
        ("-Infinity", "-Infinity is no number in JSON"),
        ('{"a": "\\ud800"}', "a text that is no Unicode"),
        ('{"\\udfff": 1}', "a text that is no Unicode"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(ToolchainError, match=said):
        parse_json(text, what="the file")


def test_what_is_sound_is_read_as_it_is() -> None:
    deep = "[" * 99 + "1" + "]" * 99
    assert parse_json(deep, what="the file")
    assert parse_json('{"a": [1, 0.5, "é", "\\ud83d\\ude00", null, true]}', what="the file") == {
        "a": [1, 0.5, "é", "\U0001f600", None, True]
    }


def test_toml_of_any_depth_is_answered(tmp_path: Path) -> None:
    for text in ("a = " + "[" * 50_000, "a = " + "9" * 5_000, "a = " + "[" * 300 + "]" * 300):
        (tmp_path / "r.toml").write_text(text)
        with pytest.raises(ToolchainError, match=r"the recipe is (not TOML|nested deeper)"):
            read_toml(tmp_path / "r.toml", what="the recipe")


def test_a_setting_of_another_kind_is_said(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"graph": 3}')
    with pytest.raises(ToolchainError, match=r"engine.json does not say its 'graph'"):
        read_setting(tmp_path / "engine.json", "graph", str)


def test_the_depth_is_looked_at_without_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DEEPEST", 3)
    assert parse_json("[[1]]", what="the file") == [[1]]
    with pytest.raises(ToolchainError, match="deeper than 3"):
        parse_json("[[[1]]]", what="the file")
