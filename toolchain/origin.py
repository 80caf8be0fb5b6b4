"""The files that an artifact was made from: recorded with it, and found again where they have been moved to.

Engines run without them. The original and the optimized PyTorch module need them, and take no others: a plan that was
made for other weights would be carried out without a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from enginewright import sources
from enginewright.artifact import digest
from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import expanded
from enginewright.recipe import Recipe
from enginewright.sources.contract import Model

Record = Mapping[str, Any]
SHOWN = 4
"""Faults that an error names."""


def recorded(recipe: Recipe, model: Model) -> dict[str, Any]:
    """What a manifest keeps: whether the source lies here (or on a hub), and its files with size and SHA-256."""
    files = {name: {"bytes": path.stat().st_size, "sha256": digest(path)} for name, path in model.files.items()}
    place = old_place(recipe)
    return {"local": place is not None and place.exists(), "files": files}


def old_place(recipe: Recipe) -> Path | None:
    """The file or folder that a recipe names; None for a model that comes without one."""
    if recipe.head.weights:
        return recipe.path(recipe.head.weights)
    parts = sources.parts_of_path(recipe.head.model)
    return recipe.path(parts.path) if parts else None


def located(recipe: Recipe, record: Record | None, places: Sequence[Path | None]) -> Recipe:
    """A recipe whose source lies at the first of ``places`` that holds the recorded files.

    Args:
        recipe: an artifact's.
        record: what its manifest says about the source; None: nothing, as in artifacts of early versions.
        places: where the source may be; None stands for where it was.

    Raises:
        ToolchainError: it is at none of them.
    """
    files = (record or {}).get("files", {})
    if not files:
        if None not in places:
            raise ToolchainError(
                "the artifact records no files of its source, so that none can be checked", help="export it again"
            )
        return recipe
    errors = []
    for place in places:
        if place is None and record is not None and not record["local"]:
            return recipe  # on a hub; checked once it was fetched
        found = old_place(recipe) if place is None else expanded(place)
        assert found is not None
        faults = faults_of(files, {name: Path(os.path.normpath(found / name)) for name in files})
        if not faults:
            return recipe if place is None else at_place(recipe, found)
        errors.append(not_the_source(found, faults, files, moved=place is None))
    raise errors[0]


def at_place(recipe: Recipe, place: Path) -> Recipe:
    """The same recipe with its source elsewhere."""
    path = str(place.resolve())
    parts = sources.parts_of_path(recipe.head.model)
    change = {"model": parts._replace(path=path).text} if parts and not recipe.head.weights else {"weights": path}
    return replace(recipe, head=recipe.head.model_copy(update=change))


def check(model: Model, record: Record | None) -> None:
    """Raise when a model that was loaded is not the recorded one."""
    files = (record or {}).get("files", {})
    if faults := faults_of(files, model.files):
        place = next(iter(model.files.values()), Path(model.name))
        raise not_the_source(place.parent, faults, files, moved=False)


def faults_of(files: Mapping[str, Mapping[str, Any]], found: Mapping[str, Path]) -> list[str]:
    """What differs between recorded files and those found."""
    faults = []
    for name, wanted in files.items():
        path = found.get(name)
        if path is None or not path.is_file():
            faults.append(f"{path.name if path else name} is missing")
        elif path.stat().st_size != wanted["bytes"]:
            faults.append(f"{path.name} has {path.stat().st_size} bytes, not {wanted['bytes']}")
        elif digest(path) != wanted["sha256"]:
            faults.append(f"{path.name} has another SHA-256")
    return faults


def not_the_source(
    place: Path, faults: Sequence[str], files: Mapping[str, Mapping[str, Any]], *, moved: bool
) -> ToolchainError:
    """The error for a place that does not hold what an artifact was made from."""
    listed = "; ".join(faults[:SHOWN]) + ("; …" if len(faults) > SHOWN else "")
    largest = max(files, key=lambda name: files[name]["bytes"])
    name = "one file" if largest == "." else Path(largest).name
    recorded = f"{name} of {files[largest]['bytes']} bytes, SHA-256 {files[largest]['sha256']}"
    if len(files) > 1:
        recorded += f", and {len(files) - 1} more"
    say = f"the artifact was made from {recorded}"
    if moved and not place.exists():
        return ToolchainError(
            "the source of the artifact is not where it was",
            where=str(place),
            help=f"{say}; say where that is now: --source PATH, or source=PATH in Python",
        )
    return ToolchainError(f"this is not what the artifact was made from: {listed}", where=str(place), help=say)
