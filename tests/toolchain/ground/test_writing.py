"""Files that are written: whole at every moment, through no link, and one clear error where the machine refuses."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from enginewright.ground import writing
from enginewright.ground.errors import ToolchainError
from enginewright.ground.writing import WRITER, in_words, replacing, sweep, workplace, write_text, write_where_told
from tests.disks import disk, may_mount


def in_a_child(work: Callable[[], None]) -> int:
    """Run in a forked process; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def killed(work: Callable[[], None]) -> None:
    """Run in a forked process that kills itself in ``work``."""
    assert os.WTERMSIG(in_a_child(work)) == signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_file_is_replaced_whole_keeps_its_mode_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    file.chmod(0o640)
    write_text(file, "néw")
    assert file.read_text(encoding="utf-8") == "néw"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "a.html").symlink_to("victim")
    (tmp_path / "b.html").symlink_to("absent")
    for name in ("a.html", "b.html"):
        write_text(tmp_path / name, "page")
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "absent").exists()


def test_a_link_that_the_user_named_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "v3.json").write_text("mine")
    (tmp_path / "base.json").symlink_to("v3.json")
    with pytest.raises(ToolchainError, match=r"the baseline cannot be written: it is a link to 'v3.json'"):
        write_where_told(tmp_path / "base.json", "x", what="the baseline")
    assert (tmp_path / "v3.json").read_text() == "mine"


def test_a_pipe_that_the_user_named_is_written_straight(tmp_path: Path) -> None:
    reading, writing_end = os.pipe()
    (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{writing_end}")
    write_where_told(tmp_path / "stdout", "text")
    assert os.read(reading, 100) == b"text"
    write_where_told(Path(os.devnull), "text")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "a folder is in the way"),
        ("file/x", "a part of its path is no folder"),
        ("absent/x", "its folder does not exist"),
        ("n" * 300, "its name is too long"),
        ("a\0b", "its path holds a null byte"),
        ("loop/x", "its path is a circle of links"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    for write in (write_text, write_where_told):
        with pytest.raises(ToolchainError, match=message):
            write(tmp_path / path, "x")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES])
def test_what_the_machine_refuses_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file = tmp_path / "a"
    write_text(file, "old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "a")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(ToolchainError, match=f"'a' cannot be written: {writing.REASONS[number]}") as caught:
        write_text(file, "new")
    assert caught.value.exit_code == 2
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_limit_on_the_size_of_files_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """As a quota does, in the middle of the file."""
    file = tmp_path / "a"
    write_text(file, "old")

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            write_text(file, "x" * 20_000)
        except ToolchainError as error:
            os._exit(7 if "larger than the limit" in str(error) else 8)

    assert os.waitstatus_to_exitcode(in_a_child(limited)) == 7
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


class Full:
    """A file object on a disk that holds nothing more."""

    def __enter__(self) -> Full:
        self.file = Path("/dev/full").open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.raw.close()


def test_numpys_short_write_and_safetensors_own_error_are_a_full_disk_too(tmp_path: Path) -> None:
    short = OSError("4096 requested and 0 written")
    with pytest.raises(ToolchainError, match="disk is full"), in_words("it", tmp_path):
        raise short
    assert short.errno is None
    with pytest.raises(ToolchainError, match="disk is full"), Full() as full, in_words("it", tmp_path):
        np.zeros(4096, np.uint8).tofile(full.file)
    with pytest.raises(ToolchainError, match="its folder does not exist"), in_words("it", tmp_path):
        save_file({"a": torch.zeros(3)}, tmp_path / "absent" / "a.safetensors")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for cause in (OSError("something"), ValueError("a"), KeyError("b")):
        with pytest.raises(type(cause)) as caught, in_words("it", tmp_path):
            raise cause
        assert caught.value is cause
    reading = FileNotFoundError(errno.ENOENT, "no", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError), in_words("it", tmp_path, under=tmp_path / "out"):
        raise reading
    with pytest.raises(ToolchainError), in_words("it", tmp_path, under=tmp_path):
        raise reading


def test_a_block_that_fails_replaces_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "a") as new:
        new.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    def half() -> None:
        with replacing(tmp_path / "a") as new:
            new.write_text("half")
            die()

    killed(half)
    assert len(list(tmp_path.glob(".a.partial-*"))) == 1
    write_text(tmp_path / "a", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("left", ["nothing", "a file", "the lock, empty", "the lock, half"])
def test_what_was_killed_while_a_hidden_neighbour_came_or_went_is_removed_or_left_alone(
    tmp_path: Path, left: str
) -> None:
    place = tmp_path / f".a.partial-{'0' * 12}"
    place.mkdir()
    if left == "a file":
        (place / "of a user").touch()
    elif left != "nothing":
        (place / WRITER).write_text("" if left.endswith("empty") else '{"ho')
    sweep(tmp_path / "a")
    assert place.exists() == (left == "a file")


def test_what_a_living_writer_has_is_left_alone(tmp_path: Path) -> None:
    with workplace(tmp_path / "a") as place:
        write_text(tmp_path / "a", "x")
        sweep(tmp_path / "a")
        assert (place / WRITER).exists()
    assert not place.exists()


def test_what_a_writer_of_another_machine_left_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock may not be seen here, so it may live."""
    with monkeypatch.context() as patch:
        patch.setattr(writing, "machine", lambda: {"host": "elsewhere", "boot": "b"})
        killed(lambda: leave_one(tmp_path / "a"))
    sweep(tmp_path / "a")
    (place,) = tmp_path.glob(".a.partial-*")
    (place / WRITER).write_text(json.dumps({**writing.machine(), "boot": "before the last start"}))
    sweep(tmp_path / "a")
    assert not place.exists()


def leave_one(beside: Path) -> None:
    with workplace(beside):
        die()


def test_where_nothing_can_be_locked_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "fcntl", None)
    killed(lambda: leave_one(tmp_path / "a"))
    write_text(tmp_path / "a", "x")
    assert len(list(tmp_path.glob(".a.partial-*"))) == 1


@pytest.mark.parametrize("name", [".a.partial-", ".a.partial-abc", ".a.old-abc", ".a.partial-123", ".a.partial-XYZ-1"])
def test_neighbours_of_other_names_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    write_text(tmp_path / "a", "x")
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("name", ["[a", "a*", "a[bc]", "?"])
def test_names_with_signs_of_patterns_are_names(tmp_path: Path, name: str) -> None:
    killed(lambda: leave_one(tmp_path / name))
    killed(lambda: leave_one(tmp_path / "ab"))
    write_text(tmp_path / name, "x")
    assert sorted(path.name[:3] for path in tmp_path.iterdir()) == sorted([".ab", name[:3]])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if not may_mount():
        pytest.skip("mounting needs root")
    with disk(tmp_path / "disk", "64k") as place:
        yield place


def test_a_disk_that_really_fills_leaves_the_old_file_whole(small_disk: Path) -> None:
    write_text(small_disk / "a", "old")
    with pytest.raises(ToolchainError, match="'a' cannot be written: the disk is full"):
        write_text(small_disk / "a", "x" * 100_000)
    assert (small_disk / "a").read_text() == "old"
    assert [path.name for path in small_disk.iterdir()] == ["a"]
