"""Renames that put nothing in the place of what they did not expect: where Linux can, in one step for the kernel.

Elsewhere the careful form of the same: a folder that is renamed never takes the place of a file or of a folder that
holds something, whatever the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

NOREPLACE, EXCHANGE = 1, 2
"""Flags of Linux's ``renameat2``."""

AT_FDCWD = -100

LACKING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What a kernel or a file system answers that does not know a flag."""

LONGEST_WAIT = 10.0
"""Seconds to wait for another process of ours that is between its renames."""


@cache
def renameat2() -> Any:
    """The C library's function; None where there is none."""
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None


def kernel_rename(old: Path, new: Path, flag: int) -> bool:
    """Rename with a flag; False where that is not known here.

    Raises:
        OSError: as the kernel says.
    """
    function = renameat2()
    if function is None:
        return False
    if function(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in LACKING:
        return False
    raise OSError(number, os.strerror(number), str(old), None, str(new))


def rename_new(old: Path, new: Path) -> None:
    """Rename a folder to a name that nothing has.

    Raises:
        FileExistsError: something has it.
    """
    if kernel_rename(old, new, NOREPLACE):
        return
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(old), None, str(new))
    if os.path.lexists(new):
        raise taken
    try:
        old.rename(new)  # in the time between, an empty folder at most can be replaced
    except OSError as cause:
        if cause.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise taken from cause
        raise


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step, so that neither is absent at any moment; False where that cannot be.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    return kernel_rename(one, other, EXCHANGE)


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait until no other process of ours renames in a folder; without a word where folders cannot be locked."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + LONGEST_WAIT
        while fcntl is not None and time.monotonic() < until:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.005)
                continue
            except OSError:
                pass
            break
        yield
    finally:
        os.close(handle)
