"""The output folder: written to a temporary neighbour and renamed into place, so a folder that is there is whole.

A run that is killed leaves only a hidden neighbour, which the next run removes; with ``force`` the old folder stays
whole until the new one takes its place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.errors import ToolchainError
from toolchain.reading import read_json

SCHEMA = 1
MANIFEST = "manifest.json"
RENDERED = {"report.json", "report.html", "report.md", "junit.xml"}
"""Files that ``enginewright report`` may write again; the manifest leaves their digests out."""


@contextmanager
def staging(out: Path, *, force: bool) -> Iterator[Path]:
    """A new empty folder that becomes ``out`` when the block ends well, and is removed when it does not.

    Raises:
        ToolchainError: ``out`` exists and ``force`` is off; or the disk is full.
    """
    out = out.absolute()
    sweep(out)
    refuse_existing(out, force=force)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        settle(partial)
        replace(partial, out)
    except OSError as cause:
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ToolchainError(
            f"the disk is full while writing {out.name!r}", help="nothing was left behind; make room and run again"
        ) from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise when ``out`` may not be written: it is there without ``force``, or is not ours to replace."""
    if out.exists() and not force:
        raise ToolchainError(f"the output folder {out.name!r} exists", help="choose another with -o, or pass --force")
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ToolchainError(
            f"{out.name!r} exists and is no artifact of ours; --force will not replace it",
            help="remove it yourself, or choose another with -o",
        )


def sweep(out: Path) -> None:
    """Remove what killed runs left, and put an old folder back that a killed replacement had moved aside."""
    for old in out.parent.glob(f".{out.name}.old-*"):
        if running(old):
            continue
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)
    for partial in out.parent.glob(f".{out.name}.partial-*"):
        if not running(partial):
            shutil.rmtree(partial, ignore_errors=True)


def running(folder: Path) -> bool:
    """Whether the process that a folder's name ends with is alive (and not this one)."""
    pid = int(folder.name.rpartition("-")[2])
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def settle(folder: Path) -> None:
    """Wait until every file is on the disk, so that a rename never shows a folder with holes."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(partial: Path, out: Path) -> None:
    """Put a finished folder in its place; an old one is moved aside first and removed after."""
    if not out.exists():
        partial.rename(out)
        return
    aside = out.parent / f".{out.name}.old-{os.getpid()}"
    out.rename(aside)
    partial.rename(out)
    shutil.rmtree(aside)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the content, and every other file with its size and SHA-256."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, *RENDERED)
    }
    text = json.dumps({"schema": SCHEMA, **content, "files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text)


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
    if faults:
        raise ToolchainError(f"the artifact is damaged: {'; '.join(faults)}", where=str(folder), help="export it again")
    return content
