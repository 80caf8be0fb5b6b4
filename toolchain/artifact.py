"""The output folder: written in a hidden neighbour and renamed into place, so a folder that is there is whole.

A run that is killed leaves only the neighbour, which the next run removes; with ``force`` the old folder stays whole
until the new one takes its place. Whatever the flags, only an artifact of ours is ever replaced, and that is looked at
once more when the names have changed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import read_json
from enginewright.ground.writing import in_words, make_folder, sweep, synced, workplace
from enginewright.renaming import exchange, rename_new, turn

SCHEMA = 1
MANIFEST = "manifest.json"
REPORT = "report.json"
"""The figures; the manifest holds its digest beside those of the files that engines need."""

RENDERED = {"report.html", "report.md", "junit.xml"}
"""Files that ``enginewright report`` may write again; the manifest leaves their digests out."""

OURS = ("engines/", "plans/", "weights/")
"""Folders of which the manifest lists every file."""

NEW, OLD, SWAPPING = "new", "old", "swapping"
"""In the hidden neighbour: the folder that is being written, the one it replaces where two renames are needed for
that, and a mark that the replacement has begun."""

PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{12}")

TRIES = 20
"""Looks at a place where things come and go."""


@contextmanager
def staging(out: Path, *, force: bool) -> Iterator[Path]:
    """A new empty folder that becomes ``out`` when the block ends well, and is removed when it does not.

    A link at ``out`` is followed: the folder it leads to is the one that is written or replaced.

    Raises:
        ToolchainError: ``out`` exists and ``force`` is off, or it is no artifact of ours, at the beginning or when the
            new folder is whole; or the disk is full, read-only, forbidden.
    """
    name = repr(out.name or str(out))
    with in_words(name, out):
        out = place_of(out)
        heal(out)
        refuse_existing(out, force=force)
        made = make_folders(out.parent)
    try:
        with contextlib.ExitStack() as stack:
            with in_words(name, out):
                place = stack.enter_context(workplace(out, put_back))
                folder = place / NEW
                folder.mkdir()
            with in_words(name, out, under=place):
                yield folder
            with in_words(name, out):
                settle(folder)
                with turn(out.parent):
                    publish(place, out, force=force)
                synced(out.parent)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # goes only where nothing was put into it


def place_of(out: Path) -> Path:
    """The absolute path of an output folder, behind links; its own name is that of no link."""
    try:
        return out.resolve()
    except RuntimeError as cause:  # before Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(out)) from cause


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and those around it that are missing; those that were made, the innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    make_folder(folder)
    return missing


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise when ``out`` may not be written: it is there without ``force``, or is not ours to replace."""
    with in_words(repr(out.name or str(out)), out):
        out = place_of(out)
        if not os.path.lexists(out):
            return
        if not force:
            raise ToolchainError(
                f"the output folder {out.name!r} exists", help="choose another with -o, or pass --force"
            )
        if fault := strange_in(out):
            raise ToolchainError(f"{out.name!r} {fault}; --force will not replace it", where=str(out), help=OTHERWISE)


OTHERWISE = "move away what is yours, or choose another folder with -o"


def strange_in(out: Path) -> str:
    """Why a folder is not ours to replace; empty for an artifact and for an empty folder.

    What a user put into an artifact is not ours either.
    """
    if out.is_symlink() or not out.is_dir():
        return "exists and is no artifact of ours, but a file or link"
    if not any(out.iterdir()):
        return ""
    try:
        content = read_json(out / MANIFEST, what=MANIFEST)
        known = {MANIFEST, REPORT, *content["files"], *rendered(content)}
        assert isinstance(content["schema"], int)
    except (ToolchainError, AssertionError, KeyError, TypeError):
        return "exists and is no artifact of ours"
    others = sorted(name for name in names_in(out) if name not in known)
    shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
    return f"holds what no export wrote: {shown}" if others else ""


def names_in(out: Path) -> Iterator[str]:
    """Files and links below a folder, by their paths from there, but for what killed writers left."""
    for folder, folders, files in os.walk(out):
        folders[:] = [name for name in folders if not PARTIAL.fullmatch(name)]
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in (*files, *links):
            yield Path(folder, name).relative_to(out).as_posix()


def heal(out: Path) -> None:
    """Remove what killed exports left, and put an old folder back that one of them had moved aside; never fails."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sweep(out.resolve(), put_back)


def heal_absent(out: Path) -> None:
    """Before an artifact is opened: put it back where a killed export, on a system that cannot exchange, moved it."""
    with contextlib.suppress(OSError, ValueError):
        if not os.path.lexists(out):
            heal(out)


def publish(place: Path, out: Path, *, force: bool) -> None:
    """Let the finished folder in a workplace become ``out``, and what is there, if it is ours, go into the workplace.

    Raises:
        ToolchainError: something else has appeared there; it is left, or put back, as it was.
    """
    for _ in range(TRIES):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # it came or went in this moment: look again
            if not os.path.lexists(out):
                rename_new(place / NEW, out)
                return
            if not force:
                raise ToolchainError(
                    f"{out.name!r} appeared while this run was writing it, and was left as it is",
                    where=str(out),
                    help="choose another folder with -o, or pass --force to replace an artifact",
                )
            refuse_existing(out, force=True)
            swap(place, out)
            return
    raise ToolchainError(f"{out.name!r} comes and goes: something else writes there", where=str(out), help=OTHERWISE)


def swap(place: Path, out: Path) -> None:
    """Exchange the finished folder with the artifact that is there; look at what came out, and undo it if need be."""
    (place / SWAPPING).touch()
    in_one_step = exchange(place / NEW, out)
    taken = place / (NEW if in_one_step else OLD)
    if not in_one_step:
        out.rename(taken)
    fault = strange_in(taken)
    if not fault and not in_one_step:
        try:
            rename_new(place / NEW, out)
        except FileExistsError:
            fault = "was written by something else in this moment"
    if not fault:
        return
    message = f"{out.name!r} {fault}; --force will not replace it"
    if not put_back(place):
        message += f", and what was there before is kept in {taken}"
    raise ToolchainError(message, where=str(out), help=OTHERWISE)


def put_back(place: Path) -> bool:
    """Put back what a replacement that was killed or refused had taken out; whether the workplace may be removed."""
    if not (place / SWAPPING).exists():
        return True
    done = is_whole(place) or is_put_back(place)
    if done:
        (place / SWAPPING).unlink()  # before anything else goes: what is half removed is not to be put back
    return done


def is_whole(place: Path) -> bool:
    """Whether what lies in a workplace may go: a replaced artifact, or a new one that never came to its place."""
    taken = place / OLD if os.path.lexists(place / OLD) else place / NEW
    unfinished = taken.name == OLD and (place / NEW).exists()
    return not os.path.lexists(taken) or not (unfinished or strange_in(taken))


def is_put_back(place: Path) -> bool:
    """Whether what was taken out could be put back; where something that is not ours has its place now, both stay."""
    out = place.parent / place.name[1:].rpartition(".partial-")[0]
    taken = place / OLD if os.path.lexists(place / OLD) else place / NEW
    with contextlib.suppress(FileExistsError):
        rename_new(taken, out)
        return True
    return not strange_in(out) and exchange(taken, out)


def settle(folder: Path) -> None:
    """Wait until every file is on the disk, so that a rename never shows a folder with holes."""
    for path in (*folder.rglob("*"), folder):
        synced(path)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the content, and every other file with its size and SHA-256.

    The digests find accidents. Whoever means to deceive writes new ones: they prove nothing about who made the folder.
    """
    left = {MANIFEST, REPORT, *rendered(content)}
    files = {
        name: entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in left
    }
    report = {"report": entry(folder / REPORT)} if (folder / REPORT).is_file() else {}
    text = json.dumps({"schema": SCHEMA, **content, **report, "files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text)


def rendered(content: Mapping[str, Any]) -> set[str]:
    """Files of an artifact, and of the parts of a pipeline's, that are rendered from a report."""
    return {*RENDERED, *(f"{part}/{name}" for part in content.get("parts", ()) for name in RENDERED)}


def entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


LONGEST_NAME = 1000
"""Characters of a file's path in an artifact."""


def is_entry(wanted: Any) -> bool:
    """Whether what a manifest says of one file is its size and digest."""
    sound = isinstance(wanted, dict) and wanted.keys() >= {"bytes", "sha256"}
    return sound and type(wanted["bytes"]) is int and isinstance(wanted["sha256"], str)


_digests: dict[tuple[int, ...], str] = {}


def digest(path: Path) -> str:
    """SHA-256 of a file; one with several names that did not change is read once."""
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if identity not in _digests:
        with path.open("rb") as file:
            _digests[identity] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[identity]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read an artifact's manifest and check that every file is as it was written.

    Raises:
        ToolchainError: no artifact, another schema, or files missing or changed (all listed).
    """
    heal_absent(folder)
    path = folder / MANIFEST
    content = read_json(
        path,
        what=MANIFEST,
        absent=f"{str(folder)!r} is no artifact: it has no {MANIFEST}",
        help="make one with: enginewright export MODEL -o DIR",
    )
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("files"), dict):
        raise ToolchainError(f"{MANIFEST} has another schema; this version reads {SCHEMA}", where=str(path))
    faults = []
    for name, wanted in content["files"].items():
        if "\0" in name or len(name) > LONGEST_NAME or not is_entry(wanted):
            faults.append(f"the entry of {name[:80]!r} cannot be read")
            continue
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            faults.append(f"{name} lies outside the folder")
        elif not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != wanted["bytes"] or digest(file) != wanted["sha256"]:
            faults.append(f"{name} was changed")
    faults += unlisted(folder, content["files"])
    if faults:
        raise ToolchainError(f"the artifact is damaged: {'; '.join(faults)}", where=str(folder), help="export it again")
    return content


def unlisted(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Why a list of files is not whole: it is empty, or a file of an engine, a plan or weights is not in it."""
    if not files:
        return [f"{MANIFEST} lists no files"]
    present = (path.relative_to(folder).as_posix() for place in OURS for path in (folder / place).rglob("*"))
    return [f"{name} is not in {MANIFEST}" for name in present if name not in files and (folder / name).is_file()]


def check_report(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise unless ``report.json`` is as the run wrote it."""
    path, wanted = folder / REPORT, manifest.get("report")
    if not isinstance(wanted, dict):
        raise ToolchainError(
            f"{MANIFEST} has no digest of {REPORT}, so its figures cannot be trusted to be those of the run",
            where=str(folder / MANIFEST),
            help="export it again",
        )
    if not path.is_file() or entry(path) != wanted:
        reason = "was changed since the run" if path.is_file() else "is missing"
        raise ToolchainError(f"the artifact is damaged: {REPORT} {reason}", where=str(folder), help="export it again")
