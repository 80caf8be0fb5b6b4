"""Which layers a user wants left alone: glob patterns of module paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from toolchain.errors import ToolchainError


def excluded_by(path: str, patterns: Sequence[str]) -> str:
    """The reason to skip a path that a pattern matches; empty when none does."""
    return next((f"excluded by {pattern!r}" for pattern in patterns if fnmatchcase(path, pattern)), "")


def check_patterns(patterns: Iterable[str], paths: Iterable[str], *, what: str, setting: str = "exclude") -> None:
    """Raise for a pattern that matches nothing: of one that should protect, it would be found out too late.

    Args:
        patterns: what the user wrote.
        paths: every layer that the pass could touch.
        what: what such layers are called in the error.
        setting: the parameter that holds the patterns.
    """
    known = list(paths)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in known):
            listed = ", ".join(known[:12]) + (", …" if len(known) > 12 else "") or "none"
            raise ToolchainError(f"{setting} {pattern!r} matches no {what}", help=f"{what}s: {listed}")
