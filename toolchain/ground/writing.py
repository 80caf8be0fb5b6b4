"""Writing files so that each is whole at every moment, and saying in one sentence what the machine refuses.

What is written lies in a hidden neighbour until it is whole, is on the disk before it is renamed into place, and goes
through no link. A process that is killed leaves at most that neighbour, which the next writer to the same place
removes: it is locked while its writer lives, so that no table of processes need be asked, which another container or
another host on a shared folder does not have.

A leaf, as ``reading`` is: every room may use it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from enginewright.ground.errors import ToolchainError

try:
    import fcntl
except ImportError:  # no POSIX: nothing can be locked, so nothing of others is removed
    fcntl = None  # type: ignore[assignment]

WRITER = "writer"
"""File in a hidden neighbour that its writer holds locked; says who that is."""

TOKEN = re.compile(r"[0-9a-f]{12}")

STREAM = re.compile(r"/dev/(stdout|stderr|fd/([0-9]+))")

ALWAYS_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers that no reading gives."""

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EFBIG: "the file would be larger than the limit here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EISDIR: "a folder is in the way",
    errno.ENOTDIR: "a part of its path is no folder",
    errno.EEXIST: "something is in the way",
    errno.ENOENT: "its folder does not exist",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ELOOP: "its path is a circle of links",
}


def write_text(path: Path, text: str, *, what: str = "") -> None:
    """Write a file of one of our folders, in place of whatever file or link is there.

    Args:
        path: the file.
        text: written as UTF-8.
        what: how errors call it; by default its name.

    Raises:
        ToolchainError: it cannot be written; what was there is still whole.
    """
    with replacing(path, what=what) as new:
        new.write_text(text, encoding="utf-8")


def write_where_told(path: Path, text: str, *, what: str = "") -> None:
    """Write a file that the user named: a file whole or not at all; a pipe or terminal straight.

    Raises:
        ToolchainError: it is a link, which is not followed, or cannot be written; what was there is still whole.
    """
    with in_words(what or repr(path.name), path):
        # Nothing is there that could be half; and what these names lead to is the user's to say.
        if found := STREAM.fullmatch(str(path)):
            with os.fdopen(os.dup(int({"stdout": "1", "stderr": "2"}.get(found[1], found[2]))), "w") as stream:
                stream.write(text)
            return
        mode = path.stat().st_mode if path.exists() else 0
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            with path.open("a", encoding="utf-8") as stream:
                stream.write(text)
            return
        refuse_link(path, what)
    write_text(path, text, what=what)


def refuse_link(path: Path, what: str = "") -> None:
    """Raise where a path that the user named is a link: writing through it would change a file elsewhere."""
    if path.is_symlink():
        raise ToolchainError(
            f"{what or repr(path.name)} cannot be written: it is a link to {str(path.readlink())!r}",
            where=str(path),
            help="links are not followed; name the file itself, or remove the link",
        )


@contextlib.contextmanager
def replacing(path: Path, *, what: str = "") -> Iterator[Path]:
    """A path to write a file at that takes the place of ``path`` when the block ends well.

    Raises:
        ToolchainError: it cannot be written; what was there is still whole.
    """
    with in_words(what or repr(path.name), path):
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with workplace(path) as place:
            new = place / path.name
            yield new
            if path.is_file() and not path.is_symlink():
                shutil.copymode(path, new)
            synced(new)
            os.replace(new, path)  # noqa: PTH105 - the word that promises to be atomic
            synced(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those around it, where they are missing.

    Raises:
        OSError: a file is in the way, or as the system says.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.mkdir(parents=True, exist_ok=True)


def synced(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def in_words(what: str, where: Path, *, under: Path | None = None) -> Iterator[None]:
    """Turn what the machine refuses in this block into one sentence.

    Args:
        what: what is being written.
        where: its path.
        under: errors that reading could give too count as writing only at paths in this folder; None: all do.

    Raises:
        ToolchainError: the disk is full, read-only, forbidden; a folder is missing or in the way.
    """
    try:
        yield
    except ToolchainError:
        raise
    except Exception as cause:
        reason = reason_of(cause)
        if not reason or not is_of_writing(cause, under):
            raise
        full = number_of(cause) in (errno.ENOSPC, errno.EDQUOT)
        raise ToolchainError(
            f"{what} cannot be written: {reason}",
            where=str(where)[:200].replace("\0", "\\0"),
            help="nothing was left behind; make room and run again" if full else None,
        ) from cause


def is_of_writing(cause: BaseException, under: Path | None) -> bool:
    """Whether an error comes from writing and not from reading some other file."""
    if under is None or number_of(cause) in ALWAYS_OF_WRITING:
        return True
    names = [getattr(cause, key, None) for key in ("filename", "filename2")]
    return any(isinstance(name, str) and Path(name).is_relative_to(under) for name in map(as_text, names))


def as_text(name: Any) -> Any:
    """A file name of an exception as text, where it can be."""
    return os.fspath(name) if isinstance(name, str | os.PathLike) else name


def reason_of(cause: BaseException) -> str:
    """Why something cannot be written, in words; empty where the exception is of another kind."""
    if isinstance(cause, ValueError) and "null byte" in str(cause):
        return "its path holds a null byte"
    number = number_of(cause)
    return "" if number is None else REASONS.get(number, os.strerror(number))


def number_of(cause: BaseException) -> int | None:
    """The error number of an exception, also where numpy or safetensors keep it to themselves."""
    if isinstance(cause, OSError):
        short = re.search(r"\d+ requested and \d+ written", str(cause))
        return errno.ENOSPC if cause.errno is None and short else cause.errno
    found = re.search(r"\(os error (\d+)\)", str(cause)) if type(cause).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


# Hidden neighbours


@contextlib.contextmanager
def workplace(beside: Path, rescue: Callable[[Path], bool] = lambda place: True) -> Iterator[Path]:
    """A new hidden folder beside a path, which is this process's until the block ends, and is then removed.

    Args:
        beside: what is written there takes the place of this.
        rescue: see ``sweep``, which comes first; asked at the end too.
    """
    sweep(beside, rescue)
    place, handle = None, None
    try:
        while handle is None:
            place = beside.parent / f".{beside.name}.partial-{secrets.token_hex(6)}"
            place.mkdir()
            handle = claimed(place)
        assert place is not None
        yield place
    finally:
        if place is not None and rescue(place):
            discard(place)
        if handle is not None:
            os.close(handle)


def claimed(place: Path) -> int | None:
    """Lock a new folder; None where a sweep of another process was faster than this one's lock."""
    try:
        handle = os.open(place / WRITER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileNotFoundError:
        return None
    try:
        if lock(handle) is False or not is_at(handle, place / WRITER):
            os.close(handle)
            return None
        os.write(handle, json.dumps(machine()).encode())
    except BaseException:
        os.close(handle)
        raise
    return handle


def lock(handle: int) -> bool | None:
    """Lock a file for this process; False where another has it, None where nothing can be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except OSError:
        return False


def machine() -> dict[str, str]:
    """This machine since it was started: locks of another are not always seen here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"host": platform.node(), "boot": boot}


def sweep(beside: Path, rescue: Callable[[Path], bool] = lambda place: True) -> None:
    """Remove the hidden neighbours of a path that killed writers of this machine left; never fails.

    Args:
        beside: the path.
        rescue: called with each before it goes; puts back what must not go with it, and says whether the rest may.
    """
    start = f".{beside.name}.partial-"
    try:
        names = [entry.name for entry in os.scandir(beside.parent) if entry.is_dir(follow_symlinks=False)]
    except (OSError, ValueError):
        return
    for name in names:
        if name.startswith(start) and TOKEN.fullmatch(name[len(start) :]):
            with contextlib.suppress(OSError):
                remove_if_dead(beside.parent / name, rescue)


def remove_if_dead(place: Path, rescue: Callable[[Path], bool]) -> None:
    """Remove a hidden neighbour whose writer is dead: it lived on this machine, and its lock is free."""
    try:
        handle = os.open(place / WRITER, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        place.rmdir()  # killed before it wrote anything, or after it removed all; otherwise not ours, and stays
        return
    try:
        if lock(handle) and is_at(handle, place / WRITER) and is_of_here(os.read(handle, 4096)) and rescue(place):
            discard(place)
    finally:
        os.close(handle)


def is_of_here(said: bytes) -> bool:
    """Whether what a writer wrote about itself is of this machine; a lock from elsewhere may not be seen here."""
    try:
        found = json.loads(said or b"{}")
    except ValueError:
        return True  # killed while it wrote that, on a file system whose lock was taken
    here = machine()
    if not isinstance(found, dict) or not found:
        return True
    same_start = found.get("boot") == here["boot"] != ""
    return same_start or found.get("host") == here["host"]


def discard(place: Path) -> None:
    """Remove a hidden neighbour, the file that tells whose it is last; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(place)):
            if entry.name == WRITER:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)
        if {entry.name for entry in os.scandir(place)} <= {WRITER}:
            (place / WRITER).unlink(missing_ok=True)
            place.rmdir()
