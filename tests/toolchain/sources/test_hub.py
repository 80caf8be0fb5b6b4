from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from enginewright.ground.errors import ToolchainError
from enginewright.sources.hub import folder_of
from tests.conftest import ROOT


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("reached for the network"))
    assert folder_of(str(tmp_path), ["*.json"]) == tmp_path


@pytest.mark.parametrize("text", ["nowhere", "/no/such/folder", "a/b/c", "../up", ""])
def test_what_can_be_no_name_on_the_hub_is_not_looked_up(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("reached for the network"))
    with pytest.raises(ToolchainError) as caught:
        folder_of(text, ["*.json"])
    assert f"there is no local folder {text!r}" in str(caught.value)


@pytest.mark.parametrize("fault", [LocalEntryNotFoundError("offline"), ConnectionError("no route"), RuntimeError("?")])
def test_a_hub_that_cannot_be_reached_is_one_line(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, *, allow_patterns: list[str]) -> str:
        raise fault

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ToolchainError) as caught:
        folder_of("owner/name", ["*.json"])
    assert caught.value.message == (
        f"there is no local folder 'owner/name', and the hub could not be reached ({type(fault).__name__})"
    )


def test_a_repository_that_is_not_there_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, *, allow_patterns: list[str]) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ToolchainError, match="the hub has no repository of that name"):
        folder_of("owner/name", ["*.json"])


def test_offline_the_library_itself_gives_that_line(tmp_path: Path) -> None:
    code = "from enginewright.sources.hub import folder_of; folder_of('owner/name', ['*.json'])"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert "there is no local folder 'owner/name', and the hub could not be reached" in run.stderr
