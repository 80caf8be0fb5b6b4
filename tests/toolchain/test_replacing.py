"""What an export replaces: an artifact of ours and nothing else, looked at again in the moment of the rename."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from enginewright import artifact, renaming
from enginewright.artifact import staging
from enginewright.ground import writing
from enginewright.ground.errors import ToolchainError


@pytest.fixture(params=["renameat2", "without renameat2"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the kernel's renames, and as where there are none."""
    if request.param != "renameat2":
        monkeypatch.setattr(renaming, "kernel_rename", lambda *_: False)
    return request.param


def finish(out: Path, text: str, *, force: bool = False, meanwhile: Callable[[], object] = lambda: None) -> None:
    with staging(out, force=force) as folder:
        (folder / "file").write_text(text)
        artifact.write_manifest(folder, {})
        meanwhile()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def appear(out: Path, kind: str) -> None:
    """Something of a user's."""
    if kind == "folder":
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    elif kind == "empty folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to("nowhere")
    else:
        finish(out, "mine")


def still_there(out: Path, kind: str) -> bool:
    if kind in ("folder", "another's artifact"):
        return (out / ("file" if kind != "folder" else "precious.txt")).read_text() == "mine"
    if kind == "empty folder":
        return list(out.iterdir()) == []
    return str(out.readlink()) == "nowhere" if kind == "link" else out.read_text() == "mine"


KINDS = ["folder", "empty folder", "file", "link", "another's artifact"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_appeared_while_an_export_ran_is_left_and_said(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(ToolchainError, match="'out' appeared while this run was writing it") as caught:
        finish(out, "new", meanwhile=lambda: appear(out, kind))
    assert caught.value.exit_code == 2
    assert still_there(out, kind)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_with_force_too_what_appeared_and_is_no_artifact_is_left(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(ToolchainError, match="--force will not replace it"):
        finish(out, "new", force=True, meanwhile=lambda: appear(out, kind))
    assert still_there(out, kind)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["empty folder", "another's artifact"])
def test_with_force_an_artifact_and_an_empty_folder_are_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    finish(out, "new", force=True, meanwhile=lambda: appear(out, kind))
    assert (out / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_an_artifact_that_was_exchanged_for_something_else_in_the_last_moment_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the rename."""
    out = tmp_path / "out"
    finish(out, "old")
    look = artifact.strange_in

    def slow_look(folder: Path) -> str:
        found = look(folder)
        if folder == out and not found and not (tmp_path / "moved").exists():
            out.rename(tmp_path / "moved")
            appear(out, "folder")
        return found

    def change() -> None:
        monkeypatch.setattr(artifact, "strange_in", slow_look)

    with pytest.raises(ToolchainError, match="no artifact of ours; --force will not replace it"):
        finish(out, "new", force=True, meanwhile=change)
    monkeypatch.undo()
    assert still_there(out, "folder")
    assert names(tmp_path) == ["moved", "out"]


def test_what_a_user_put_into_an_artifact_is_not_removed_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "old")
    (out / "deep").mkdir()
    (out / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(ToolchainError, match=r"holds what no export wrote: deep/notes.txt"):
        finish(out, "new", force=True)
    assert (out / "deep" / "notes.txt").read_text() == "mine"
    (out / "deep" / "notes.txt").unlink()
    finish(out, "new", force=True)
    assert names(out) == ["file", "manifest.json"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"name": "my app", "files": []}', "\xff"])
def test_a_folder_with_some_other_manifest_is_no_artifact_of_ours(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ToolchainError, match="no artifact of ours"):
        finish(out, "new", force=True)
    assert names(out) == ["manifest.json"]


def race(out: Path, *, force: bool, count: int) -> list[str]:
    """Exports that become whole in the same moment; what each ended with."""
    together = threading.Barrier(count)
    ends: list[str] = []

    def one(number: int) -> None:
        try:
            finish(out, f"{number}", force=force, meanwhile=together.wait)
            ends.append("done")
        except ToolchainError as error:
            ends.append(error.message)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_of_two_exports_to_one_folder_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    for number in range(10):
        ends = race(tmp_path / f"{number}", force=False, count=3)
        assert sorted(end == "done" for end in ends) == [False, False, True], ends
        assert all("appeared while this run" in end for end in ends if end != "done")
        artifact.read_manifest(tmp_path / f"{number}")
    assert len(names(tmp_path)) == 10


def test_four_exports_with_force_come_one_after_the_other(tmp_path: Path) -> None:
    for _ in range(10):
        assert race(tmp_path / "out", force=True, count=4) == ["done"] * 4
        artifact.read_manifest(tmp_path / "out")
        assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["a[bc]", "a*", "?", "[!a]", "{a}", "a b", "-o", "käse"])
def test_names_of_folders_are_names_and_no_patterns(tmp_path: Path, name: str) -> None:
    neighbour = tmp_path / f".ab.partial-{'0' * 12}"
    neighbour.mkdir()
    out = tmp_path / name
    finish(out, "old")
    finish(out, "new", force=True)
    assert (out / "file").read_text() == "new"
    assert names(tmp_path) == sorted([neighbour.name, name])


def test_a_link_to_an_artifact_stays_a_link_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    finish(tmp_path / "disk" / "real", "old")
    (tmp_path / "out").symlink_to("disk/real")
    with pytest.raises(ToolchainError, match="exists"):
        finish(tmp_path / "out", "new")
    finish(tmp_path / "out", "new", force=True)
    assert str((tmp_path / "out").readlink()) == "disk/real"
    assert (tmp_path / "disk" / "real" / "file").read_text() == "new"
    assert names(tmp_path / "disk") == ["real"]


def test_a_link_to_nowhere_is_filled_and_a_circle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("later")
    finish(tmp_path / "out", "new")
    assert (tmp_path / "later" / "file").read_text() == "new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ToolchainError, match=r"exists|circle"):
        finish(tmp_path / "loop", "new")


@pytest.mark.parametrize(
    ("out", "message"),
    [("file/x", "no folder"), ("n" * 250, "too long"), ("a\0b", "null byte"), ("file", "exists"), (".", "exists")],
)
def test_an_output_that_cannot_be_is_one_clear_error(tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ToolchainError, match=message):
        finish(tmp_path / out, "new")
    assert names(tmp_path) == ["file"]


def test_folders_made_for_an_export_that_failed_go_again(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), staging(tmp_path / "there" / "a" / "b" / "out", force=False):
        raise KeyError
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("name", [".out.old-abc", ".out.partial-", ".out.partial-77", ".out.old-1", ".out.partial-x-y"])
def test_stray_neighbours_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    finish(tmp_path / "out", "new")
    finish(tmp_path / "out", "newer", force=True)
    assert names(tmp_path) == sorted([name, "out"])


def test_the_folder_around_is_on_the_disk_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    wait, rename = artifact.synced, artifact.rename_new
    monkeypatch.setattr(artifact, "synced", lambda path: (order.append(path.name), wait(path))[1])
    monkeypatch.setattr(artifact, "rename_new", lambda *a: (order.append("rename"), rename(*a))[1])
    finish(tmp_path / "out", "x")
    assert order[-2:] == ["rename", tmp_path.name]


def killed_at(out: Path, function: str, call: int) -> int | None:
    """Replace an artifact in a forked process that is killed before one call of a function; None if it came through."""
    pid = os.fork()
    if pid == 0:
        calls = 0
        real = getattr(renaming if function == "kernel_rename" else Path, function)

        def counting(*given: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        setattr(renaming if function == "kernel_rename" else Path, function, counting)
        try:
            finish(out, "new", force=True)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def test_a_kill_before_any_rename_leaves_nothing_absent_and_whoever_opens_the_artifact_finds_it(
    tmp_path: Path, kernel: str
) -> None:
    out = tmp_path / "out"
    function = "kernel_rename" if kernel == "renameat2" else "rename"
    for call in range(1, 5):
        finish(out, "old", force=True)
        ended = killed_at(out, function, call)
        if kernel == "renameat2":
            assert (out / "file").exists(), "absent for a moment"
        artifact.read_manifest(out)
        assert (out / "file").read_text() == ("old" if ended else "new")
        finish(out, "next", force=True)
        assert names(tmp_path) == ["out"]
        if ended is None:
            return
    raise AssertionError("never came through")


def test_what_was_no_artifact_and_was_swapped_out_before_a_kill_comes_back(tmp_path: Path) -> None:
    """The kill between a swap and the look at what came out."""
    out = tmp_path / "out"
    finish(out, "new")
    place = tmp_path / f".out.partial-{'0' * 12}"
    (place / artifact.NEW).mkdir(parents=True)
    (place / artifact.NEW / "precious.txt").write_text("mine")
    (place / artifact.SWAPPING).touch()
    (place / "writer").touch()
    artifact.heal(out)
    mine = [path for path in tmp_path.rglob("precious.txt") if path.read_text() == "mine"]
    assert len(mine) == 1


def test_the_old_artifact_of_a_killed_replacement_is_not_removed_when_something_else_came_to_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renaming, "kernel_rename", lambda *_: False)
    out = tmp_path / "out"
    finish(out, "old")
    assert killed_at(out, "rename", 2) == signal.SIGKILL
    assert not out.exists()
    out.mkdir()
    (out / "precious.txt").touch()
    artifact.heal(out)
    assert (out / "precious.txt").exists()
    (out / "precious.txt").unlink()
    out.rmdir()
    assert json.loads((next(iter(tmp_path.glob(".out.partial-*"))) / "old" / "manifest.json").read_text())
    artifact.read_manifest(out)
    assert names(tmp_path) == ["out"]


def test_an_old_artifact_that_was_half_removed_when_its_replacement_was_killed_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    finish(out, "old")

    def half(place: Path) -> None:
        for old in (artifact.NEW, artifact.OLD):
            (place / old / "manifest.json").unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):  # killed in its own clearing up, and in that of the next one
        pid = os.fork()
        if pid == 0:
            monkeypatch.setattr(writing, "discard", half)
            finish(out, "new", force=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        artifact.read_manifest(out)
        assert (out / "file").read_text() == "new"
    finish(out, "next", force=True)
    assert names(tmp_path) == ["out"]
