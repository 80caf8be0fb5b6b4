"""Small file systems of their own, for what happens when a disk is full or read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def disk(place: Path, size: str, *, inodes: int = 0) -> Iterator[Path]:
    """A file system of this size at ``place``; root of this machine or of a user namespace of its own may mount one."""
    place.mkdir()
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def make_read_only(place: Path) -> None:
    """From now on nothing can be written there."""
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)


def may_mount() -> bool:
    """Whether this process may mount file systems."""
    return hasattr(os, "geteuid") and os.geteuid() == 0
