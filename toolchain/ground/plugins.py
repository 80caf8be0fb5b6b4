"""What other installed packages add: passes, targets, models and metrics, found by their entry points.

A package names the module of each in its ``pyproject.toml``, under ``[project.entry-points."enginewright.passes"]`` (or
``.targets``, ``.models``, ``.metrics``), by the name that it is to have. The module is as a file of ours would be.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path


@cache
def installed(kind: str) -> dict[str, str]:
    """Dotted names of the modules that other packages add to a kind, by the name of what they hold."""
    return {point.name: point.value for point in entry_points(group=f"enginewright.{kind}")}


def file_of(module: str) -> Path | None:
    """Where a module lies, which is not imported; None where it is not there."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None
