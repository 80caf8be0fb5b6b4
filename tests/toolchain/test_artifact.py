from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enginewright import artifact
from enginewright.ground.errors import ToolchainError
from tests.conftest import ROOT
from tests.disks import disk, may_mount


def finish(out: Path, text: str, *, force: bool = False) -> None:
    with artifact.staging(out, force=force) as folder:
        (folder / "file").write_text(text)
        artifact.write_manifest(folder, {})


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), artifact.staging(out, force=False) as folder:
        (folder / "half").write_text("half")
        assert not out.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    finish(out, "whole")
    artifact.read_manifest(out)


def test_an_existing_folder_is_refused_and_with_force_replaced_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "old")
    with pytest.raises(ToolchainError, match=r"'out' exists(.|\n)*--force"):
        finish(out, "new")
    with pytest.raises(RuntimeError), artifact.staging(out, force=True):
        raise RuntimeError
    assert (out / "file").read_text() == "old"
    finish(out, "new", force=True)
    assert (out / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_force_never_removes_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    with pytest.raises(ToolchainError, match="no artifact of ours"):
        finish(tmp_path / "photos", "new", force=True)
    assert (tmp_path / "photos" / "one.jpg").exists()


def test_a_full_disk_is_said_in_words_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="disk is full"), artifact.staging(tmp_path / "out", force=False) as folder:
        (folder / "some").write_text("some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, where this process may mount one."""
    if not may_mount():
        pytest.skip("mounting needs root")
    with disk(tmp_path / "disk", "200k") as place:
        yield place


def test_a_disk_that_really_fills_in_the_middle_of_an_export(small_disk: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "enginewright", "export", "dit:tiny", "-o", str(small_disk / "out")],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "disk is full" in run.stderr
    assert "Traceback" not in run.stderr
    assert list(small_disk.iterdir()) == []


def export_killed(out: Path, at: Callable[[Path], object]) -> None:
    """An export in a forked process that is killed when ``at`` is done with its folder."""
    pid = os.fork()
    if pid == 0:
        try:
            with artifact.staging(out, force=True) as folder:
                at(folder)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_what_a_killed_run_left_is_swept_up_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    export_killed(tmp_path / "out", lambda folder: (folder / "half").touch())
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    with artifact.staging(tmp_path / "out", force=False) as alive:
        (alive / "file").touch()
        finish(tmp_path / "out", "x")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.parent.name, "out"])
        artifact.write_manifest(alive, {})
        (tmp_path / "out").rename(tmp_path / "first")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "out"]


def test_kill_9_in_the_middle_leaves_no_half_artifact_and_the_next_run_works(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "enginewright", "export", "dit:tiny", "-o", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.partial-*")):
        assert run.poll() is None, "the export ended before it was killed"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.partial-*"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_changed_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "x")
    (out / "file").write_text("y")
    with pytest.raises(ToolchainError, match="file was changed"):
        artifact.read_manifest(out)
    (out / "file").unlink()
    with pytest.raises(ToolchainError, match="file is missing"):
        artifact.read_manifest(out)
    content = json.loads((out / "manifest.json").read_text())
    content["files"] = {"../secret": {"bytes": 1, "sha256": ""}}
    (out / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ToolchainError, match="outside the folder"):
        artifact.read_manifest(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ToolchainError, match="not JSON"):
        artifact.read_manifest(out)
    with pytest.raises(ToolchainError, match="no artifact"):
        artifact.read_manifest(tmp_path)


def test_an_emptied_list_of_files_is_damage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "x")
    content = json.loads((out / "manifest.json").read_text()) | {"files": {}}
    (out / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ToolchainError, match=r"manifest\.json lists no files"):
        artifact.read_manifest(out)


def test_a_file_of_an_engine_that_the_manifest_does_not_list_is_damage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "x")
    (out / "note.txt").write_text("a user's own")
    artifact.read_manifest(out)
    (out / "engines" / "onnxruntime").mkdir(parents=True)
    (out / "engines" / "onnxruntime" / "model.onnx").write_text("junk")
    with pytest.raises(ToolchainError, match=r"engines/onnxruntime/model\.onnx is not in manifest\.json"):
        artifact.read_manifest(out)


def test_a_report_that_was_edited_or_is_covered_by_no_digest_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("{}")
    (out / "file").write_text("x")
    artifact.write_manifest(out, {})
    manifest = artifact.read_manifest(out)
    artifact.check_report(out, manifest)
    (out / "report.json").write_text("[]")
    artifact.read_manifest(out)  # an engine runs without its report
    with pytest.raises(ToolchainError, match=r"report\.json was changed since the run"):
        artifact.check_report(out, manifest)
    (out / "report.json").unlink()
    with pytest.raises(ToolchainError, match=r"report\.json is missing"):
        artifact.check_report(out, manifest)
    del manifest["report"]
    with pytest.raises(ToolchainError, match="has no digest of report"):
        artifact.check_report(out, manifest)
