"""Reading files that may hold anything: bounded in size and depth, with one clear error for whatever is wrong.

A leaf, as ``errors`` is: every room may use it.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from enginewright.ground.errors import ToolchainError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_TEXT = 64_000_000
"""Bytes of a text file that is read whole: a report with its pictures has a few million."""

DEEPEST = 100
"""Levels of lists and tables in each other; what we write has fewer than ten."""


def read_text(path: Path, *, what: str, absent: str = "", help: str | None = None) -> str:
    """Read a UTF-8 text file.

    Args:
        path: the file.
        what: what it should be, with its article, such as ``the recipe``.
        absent: the message where there is no such file.
        help: what to do about that.

    Raises:
        ToolchainError: not there, no regular file, not readable, larger than ``LARGEST_TEXT``, or not UTF-8.
    """
    where = str(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block for ever
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ToolchainError(f"{what} is no file: {path.name!r} is {kind_of(status.st_mode)}", where=where)
            if status.st_size > LARGEST_TEXT:
                size = f"{status.st_size / 1e6:.0f} MB"
                raise ToolchainError(f"{what} is larger than {LARGEST_TEXT // 10**6} MB: {size}", where=where)
            return file.read(LARGEST_TEXT + 1).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError) as cause:
        raise ToolchainError(absent or f"{what} is not there: {path.name!r}", where=where, help=help) from cause
    except UnicodeDecodeError as cause:
        raise ToolchainError(f"{what} is not UTF-8 text: {cause.reason} at byte {cause.start}", where=where) from cause
    except OSError as cause:
        raise ToolchainError(f"{what} cannot be read: {cause.strerror}", where=where[:200]) from cause
    except ValueError as cause:  # a NUL in the path
        raise ToolchainError(f"{what} cannot be read: {cause}", where=repr(where)[:200]) from cause


def kind_of(mode: int) -> str:
    """What something on the disk is, in words."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((said for test, said in kinds if test(mode)), "a device")


def read_json(path: Path, *, what: str, absent: str = "", help: str | None = None, finite: bool = True) -> Any:
    """Read a JSON file; see ``read_text`` and ``parse_json``."""
    text = read_text(path, what=what, absent=absent, help=help)
    return parse_json(text, what=what, where=str(path), finite=finite)


def read_setting(path: Path, key: str, kind: type[Any]) -> Any:
    """Read one entry of a JSON table, which must be of a kind.

    Raises:
        ToolchainError: there is no such file, entry or kind.
    """
    content = read_json(path, what=path.name)
    if not isinstance(content, dict) or not isinstance(content.get(key), kind):
        raise ToolchainError(f"{path.name} does not say its {key!r}", where=str(path), help="export it again")
    return content[key]


def parse_json(text: str | bytes, *, what: str, where: str | None = None, finite: bool = True) -> Any:
    """Parse JSON as its standard has it: no NaN, no infinity, no lone surrogates, no bottomless nesting.

    Args:
        text: JSON.
        what: what it should be, with its article.
        where: the place that errors name.
        finite: refuse NaN and infinities, which Python would read; a reader that judges numbers itself turns it off.

    Raises:
        ToolchainError: it is none; the message begins with ``what``.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number in JSON")

    try:
        content = json.loads(text, parse_constant=refuse if finite else None)
    except RecursionError as cause:
        raise too_deep(what, where) from cause
    except ValueError as cause:  # not JSON, not UTF-8, or whole numbers of thousands of digits
        raise ToolchainError(f"{what} is not JSON: {first_line(cause)}", where=where) from cause
    check_depth(content, what, where)
    return content


def read_toml(path: Path, *, what: str, absent: str = "") -> dict[str, Any]:
    """Read a TOML file; see ``read_text``.

    Raises:
        ToolchainError: it is none; the message begins with ``what``.
    """
    text = read_text(path, what=what, absent=absent)
    try:
        content = tomllib.loads(text)
    except RecursionError as cause:
        raise too_deep(what, str(path)) from cause
    except ValueError as cause:
        raise ToolchainError(f"{what} is not TOML: {first_line(cause)}", where=str(path)) from cause
    check_depth(content, what, str(path))
    return content


def check_depth(content: Any, what: str, where: str | None) -> None:
    """Raise where lists and tables are nested deeper than ``DEEPEST``, or a text is no Unicode."""
    level = [content]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                below += each
            elif isinstance(each, str) and not each.isascii() and any("\ud800" <= char <= "\udfff" for char in each):
                raise ToolchainError(f"{what} holds a text that is no Unicode: {each[:80]!r}", where=where)
        if not below:
            return
        level = below
    raise too_deep(what, where)


def too_deep(what: str, where: str | None) -> ToolchainError:
    """The error for nesting that no reader should follow."""
    return ToolchainError(f"{what} is nested deeper than {DEEPEST} levels; refused", where=where)


def first_line(cause: BaseException) -> str:
    """The first line of an exception's message, not too long."""
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]


def read_tensors(path: Path, *, what: str, absent: str = "") -> dict[str, Tensor]:
    """Read a safetensors file into memory.

    Raises:
        ToolchainError: not there, no regular file, or not a whole safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = str(path)
    try:
        if not path.is_file():
            message = absent or f"{what} is not there: {path.name!r}"
            raise ToolchainError(f"{what} is no file: {path.name!r}" if path.exists() else message, where=where)
        return load_file(path)
    except OSError as cause:
        raise ToolchainError(f"{what} cannot be read: {cause.strerror or first_line(cause)}", where=where) from cause
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, AttributeError) as cause:
        raise ToolchainError(f"{what} is not a whole safetensors file: {first_line(cause)}", where=where) from cause


def expanded(text: str | Path) -> Path:
    """A path with a leading ``~`` or ``~user`` replaced; as it stands where there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
