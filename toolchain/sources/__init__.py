"""Where models come from; one file a source.

``PREFIX:REST`` goes to ``sources/PREFIX_source.py`` where there is one; anything else names a reference model.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from enginewright.sources.contract import Model
    from enginewright.sources.jobs import Job

FILES = ("onnx", "pt2", "py")
"""Sources whose strings hold a path; those of others hold one if it is there, and may else name a model on a hub."""


def prefixes() -> list[str]:
    """What a model string may begin with, before its colon."""
    return sorted(path.stem.removesuffix("_source") for path in Path(__file__).parent.glob("*_source.py"))


def gives(text: str) -> Literal["module", "graph"]:
    """What a model string stands for: a PyTorch module or an ONNX graph."""
    return "graph" if text.partition(":")[0] == "onnx" else "module"


def load(text: str, *, weights: Path | None = None, seed: int = 0, trust_remote_code: bool = False) -> Model:
    """The model that a string asks for.

    Args:
        text: ``PREFIX:REST``, or ``NAME:SIZE`` of a reference model.
        weights: a safetensors file for a reference model.
        seed: of random weights.
        trust_remote_code: run code that a checkpoint folder brings along.

    Raises:
        ToolchainError: no such model, with the nearest name; or what stands in its way.
    """
    prefix = text.partition(":")[0]
    if prefix not in prefixes():
        from enginewright.sources import reference
        from enginewright.sources.mistaken import mistaken

        if fault := mistaken(text):
            raise fault

        return reference.load(text, weights=weights, seed=seed)
    if weights is not None:
        from enginewright.ground.errors import ToolchainError

        raise ToolchainError(f"--weights is for reference models; {text!r} brings its own")
    source = importlib.import_module(f"enginewright.sources.{prefix}_source")
    model: Model = source.load(text, seed=seed, trust_remote_code=trust_remote_code)
    return model


def parts_of(text: str) -> list[str]:
    """Names of the networks that a model string stands for when it stands for several, as a pipeline's folder does."""
    prefix = text.partition(":")[0]
    if "#" in text:
        return []
    if prefix not in prefixes():
        from enginewright.sources import reference

        return list(reference.components(text))
    source = importlib.import_module(f"enginewright.sources.{prefix}_source")
    found = source.components(text) if hasattr(source, "components") else []
    return [part.partition("#")[2] for part in found] if len(found) > 1 else []


def job_of(text: str, **settings: Any) -> Job:
    """The whole job of a model string that stands for several networks.

    Args:
        text: as ``parts_of`` takes it.
        settings: how it is run: ``prompts``, ``steps``, ``arguments``.

    Raises:
        ToolchainError: there is none, or it cannot be run here, and why.
    """
    prefix = text.partition(":")[0]
    source = importlib.import_module(
        f"enginewright.sources.{f'{prefix}_source' if prefix in prefixes() else 'reference'}"
    )
    if not hasattr(source, "job"):
        from enginewright.ground.errors import ToolchainError

        raise ToolchainError(f"the networks of {text!r} do nothing together: source {prefix!r} has no whole job")
    found: Job = source.job(text, **settings)
    return found


class PathParts(NamedTuple):
    """A model string around the path that it holds."""

    prefix: str
    path: str
    rest: str

    @property
    def text(self) -> str:
        """The model string."""
        return f"{self.prefix}:{self.path}{self.rest}"


def parts_of_path(text: str) -> PathParts | None:
    """A model string taken apart; None for a reference model, which holds no path.

    For sources other than ``FILES`` the path may be a name on a hub.
    """
    found = (
        re.fullmatch(r"(onnx):([^?]+)(\?.*)?", text)
        or re.fullmatch(r"(hf):([^?]+?)((?:#\w+)?(?:\?.*)?)", text)
        or re.fullmatch(r"(\w+):(.+?)([:#]\w+)?", text)
    )
    return PathParts(found[1], found[2], found[3] or "") if found and found[1] in prefixes() else None


def with_path(text: str, folder: Path, change: Callable[[str], str]) -> str:
    """A model string whose path, where it holds one, went through ``change``.

    Args:
        text: as for ``load``.
        folder: where the path starts.
        change: from the path as it stands to another.
    """
    parts = parts_of_path(text)
    if not parts or (parts.prefix not in FILES and not (folder / parts.path).exists()):
        return text
    return parts._replace(path=change(parts.path)).text


def short_name(text: str) -> str:
    """A model string without the folders that its path leads through: what reports call the model."""
    return with_path(text, Path(), lambda path: Path(path).resolve().name)
