"""Every command that writes a file: the old one or the new one whole, nothing elsewhere, and one clear error."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from enginewright.artifact import strange_in
from enginewright.cli import main
from enginewright.ground.errors import ToolchainError
from enginewright.passes.heads.search_log import SearchLog
from enginewright.passes.recovery import checkpoints
from tests.disks import disk, make_read_only, may_mount

RENDERED = ("report.html", "report.md", "junit.xml")


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    shutil.copytree(artifact, tmp_path / "out")
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", RENDERED)
def test_a_report_writes_through_no_link(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy.parent / "victim").write_text("mine")
    (copy / name).unlink()
    (copy / name).symlink_to("../victim")
    assert main(["report", str(copy)]) == 0
    assert (copy.parent / "victim").read_text() == "mine"
    assert not (copy / name).is_symlink()
    assert sorted(path.name for path in copy.parent.iterdir()) == ["out", "victim"]


def test_a_report_that_does_not_fit_leaves_the_old_one_whole(copy: Path) -> None:
    """A limit on the size of files stands in for a quota."""
    before = contents(copy)
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            os._exit(main(["report", str(copy), "--quiet"]))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert contents(copy) == before


@pytest.mark.parametrize("name", RENDERED)
def test_a_folder_in_the_place_of_a_report_is_an_error(
    copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    assert main(["report", str(copy)]) == 2
    assert f"'{name}' cannot be written: a folder is in the way" in capsys.readouterr().err


def update(copy: Path, baseline: Path) -> int:
    return main(["check", str(copy), "--baseline", str(baseline), "--update"])


@pytest.mark.parametrize(
    ("option", "what"), [("--junit", "the JUnit file"), ("--update", "the baseline")], ids=["junit", "baseline"]
)
@pytest.mark.parametrize("place", ["nowhere/x", "file/x", "folder", "link", "loop"])
def test_check_writes_only_where_it_may(
    copy: Path, option: str, what: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy.parent
    assert update(copy, folder / "b.json") == 0
    (folder / "file").write_text("mine")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("file")
    (folder / "loop").symlink_to("loop")
    capsys.readouterr()
    command = ["check", str(copy), "--baseline", str(folder / "b.json"), "--junit", str(folder / place)]
    if option == "--update":
        command = ["check", str(copy), "--baseline", str(folder / place), "--update"]
    made = place == "nowhere/x"  # the folder is made
    code = main(command)
    error = capsys.readouterr().err
    assert code == (0 if made else 2), error
    assert made or error.startswith("error: ")
    assert (folder / "file").read_text() == "mine"
    assert (folder / "link").is_symlink()


def test_junit_goes_to_a_pipe(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    update(copy, copy.parent / "b.json")
    capfd.readouterr()
    code = main(["check", str(copy), "--baseline", str(copy.parent / "b.json"), "--junit", "/dev/stdout", "--json"])
    assert code == 0
    assert "<testsuite" in capfd.readouterr().out


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Some kilobytes."""
    if not may_mount():
        pytest.skip("mounting needs root")
    with disk(tmp_path / "disk", "48k") as place:
        yield place


def test_a_read_only_and_a_full_disk_are_one_clear_error_each(
    artifact: Path, full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("recipe.toml", "report.json"):
        shutil.copy(artifact / name, full_disk)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"] = {"recipe.toml": manifest["files"]["recipe.toml"]}
    (full_disk / "manifest.json").write_text(json.dumps(manifest))
    (full_disk / "report.html").write_text("old")
    (full_disk / "filler").write_bytes(b"x" * (os.statvfs(full_disk).f_bavail * os.statvfs(full_disk).f_frsize - 4096))
    before = contents(full_disk)
    assert main(["report", str(full_disk)]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert update(artifact, full_disk / "b.json") == 2
    assert "the disk is full" in capsys.readouterr().err
    make_read_only(full_disk)
    for command in (
        ["report", str(full_disk)],
        ["check", str(artifact), "--baseline", str(full_disk / "b.json"), "--update"],
        ["export", "dit:tiny", "--no-validate", "--quiet", "-o", str(full_disk / "out")],
    ):
        assert main(command) == 2
        assert "cannot be written: the file system is read-only" in capsys.readouterr().err
    assert contents(full_disk) == before


def test_the_log_of_a_search_keeps_whole_lines_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = SearchLog(tmp_path / "deep" / "log", "s")
    log.add("a", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(ToolchainError, match="the log of the search cannot be written: the disk is full"):
            log.add("b", 2.0)
    assert SearchLog(tmp_path / "deep" / "log", "s").scores == {"a": 1.0}


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_log_of_a_search_follows_no_link_and_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("")
    (tmp_path / "log").symlink_to("victim")
    with pytest.raises(ToolchainError, match="it is a link to 'victim'"):
        SearchLog(tmp_path / "log", "s")
    assert (tmp_path / "victim").read_text() == ""
    with pytest.raises(ToolchainError, match="no folder"):
        SearchLog(tmp_path / "victim" / "log", "s")


def save(folder: Path, step: int) -> None:
    weights = {"w": nn.Parameter(torch.full((1000,), float(step)))}
    checkpoints.save(folder, weights, torch.optim.SGD(weights.values(), lr=1.0), checkpoints.State(step=step), "{}")


def step_in(folder: Path) -> int:
    weights = {"w": nn.Parameter(torch.zeros(1000))}
    state = checkpoints.load(folder, weights, torch.optim.SGD(weights.values(), lr=1.0), "{}")
    assert (weights["w"] == state.step).all()
    return state.step


def test_what_killed_saves_left_beside_a_checkpoint_is_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for wait_for in ("save_file", "fsync", "replace"):
        pid = os.fork()
        if pid == 0:
            die_in(wait_for)
            save(tmp_path, 9)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert step_in(tmp_path) == 1
        assert len(list(tmp_path.iterdir())) == 2
        save(tmp_path, 1)
        assert [path.name for path in tmp_path.iterdir()] == [checkpoints.FILE]


def die_in(name: str) -> None:
    """From now on the process is killed in the middle of this function."""

    def half(*given: object, **_: object) -> None:
        if name == "save_file":
            Path(str(given[1])).with_name(".tmpAbCdEf").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(checkpoints if name == "save_file" else os, name, half)


@pytest.mark.parametrize("name", [".distill.safetensors.7", ".tmpAbCdEf", f".distill.safetensors.partial-{'0' * 11}"])
def test_files_of_others_beside_a_checkpoint_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    save(tmp_path, 1)
    assert (tmp_path / name).exists()


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(ToolchainError, match="the checkpoint cannot be written: the disk is full"):
        save(tmp_path, 2)
    assert step_in(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.FILE]


def test_two_updates_at_once_leave_one_whole_baseline(copy: Path) -> None:
    baseline = copy.parent / "b.json"
    pids = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            os._exit(max(update(copy, baseline) for _ in range(5)))
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert json.loads(baseline.read_text())["figures"]
    assert sorted(path.name for path in copy.parent.iterdir()) == ["b.json", "out"]


def test_nothing_in_an_artifact_is_strange_to_the_next_export(artifact: Path) -> None:
    """Whatever an export writes, the next one with --force may replace."""
    assert strange_in(artifact) == ""
