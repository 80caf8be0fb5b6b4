"""How a run that fails ends: in words that say whose fault it is, as JSON where that was asked for, and in a code."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from enginewright.ground.errors import INTERNAL, FaultsError, InternalError, ToolchainError

DEBUG = "ENGINEWRIGHT_DEBUG"
"""An environment variable; where it is set, whole tracebacks are shown."""

FRAMES = 4
"""Of a traceback, where it is not shown whole."""

REPORT = f"please report it with the command, these lines and what `enginewright doctor` says; {DEBUG}=1 shows more"

REASONS = {
    errno.EISDIR: "it is a folder, and a file is wanted",
    errno.ENOTDIR: "a part of the path is a file, and a folder is wanted",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "there is no such file or folder",
    errno.EEXIST: "it exists already",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not allow it",
    errno.EROFS: "the disk can only be read from",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.ELOOP: "its links lead in a circle",
}
"""What an operating system's errors mean here."""


def check_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that no path or name can be.

    Raises:
        ToolchainError: one holds a NUL character.
    """
    for text in arguments:
        if "\0" in text:
            raise ToolchainError(f"an argument holds a NUL character: {text[:80]!r}")


def ended(error: Exception, *, as_json: bool) -> int:
    """Say what an exception means to the user, and give the exit code.

    What a user can mend (a ``ToolchainError``, or what the operating system says of a path) comes without a traceback;
    everything else is a fault of ours and comes with one.
    """
    fault = mendable(error)
    if fault is None:
        return told_bug(error, as_json=as_json)
    if as_json:
        faults = fault.faults if isinstance(fault, FaultsError) else (fault,)
        print(json.dumps({"errors": [entry(each) for each in faults]}, indent=2))
    print(f"error: {fault}", file=sys.stderr)
    if os.environ.get(DEBUG) and fault is not error:
        traceback.print_exception(error)
    return fault.exit_code


def entry(fault: ToolchainError) -> dict[str, Any]:
    """A fault as JSON has it."""
    return {"message": fault.message, "where": fault.where, "help": fault.help}


def mendable(error: Exception) -> ToolchainError | None:
    """The fault that a user can mend; None for one of ours."""
    if isinstance(error, ToolchainError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return of_system(error)
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return ToolchainError("a path holds a NUL character", help="look for \\u0000 in the recipe or the arguments")
    return None


def of_system(error: OSError) -> ToolchainError:
    """What the operating system says of a path, in plain words."""
    path = str(error.filename) if error.filename is not None else ""
    name = path if len(path) <= 120 else f"{path[:120]}…"
    reason = REASONS.get(error.errno or 0) or (error.strerror or str(error)).lower()
    help_ = "choose another place with -o, or make it writable" if error.errno in (errno.EACCES, errno.EROFS) else None
    return ToolchainError(f"{name!r} cannot be used: {reason}" if name else reason, help=help_)


def told_bug(error: Exception, *, as_json: bool) -> int:
    """Say that the fault is ours, where it happened and what to report."""
    whole = "".join(traceback.format_exception(error))
    cause = {
        MemoryError: "memory ran out",
        RecursionError: "something is nested too deeply",
    }.get(type(error), str(getattr(error, "message", error)).strip() or type(error).__name__)
    where = error.where if isinstance(error, InternalError) else None
    stage = next((note for note in getattr(error, "__notes__", ())), "")
    if as_json:
        told = {
            "message": f"a bug in enginewright, not in your input: {cause}",
            "where": where or stage or None,
            "help": REPORT,
            "traceback": whole,
        }
        print(json.dumps({"errors": [told]}, indent=2))
    short = "".join(traceback.format_exception(error, limit=-FRAMES, chain=False))
    print(whole if os.environ.get(DEBUG) else short, file=sys.stderr, end="")
    print(f"\nerror: this is a bug in enginewright, not in your input: {cause}", file=sys.stderr)
    if where or stage:
        print(f"  --> {where or stage}", file=sys.stderr)
    print(f"  help: {REPORT}", file=sys.stderr)
    return INTERNAL
