"""Where models come from; one file a source.

``PREFIX:REST`` goes to ``sources/PREFIX.py`` where there is one; anything else names a reference model.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolchain.sources.contract import Model


def load(text: str, *, weights: Path | None = None, seed: int = 0) -> Model:
    """The model that a string asks for.

    Raises:
        ToolchainError: no such model, with the nearest name.
    """
    prefix = text.partition(":")[0]
    own = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"__init__", "contract", "reference"}
    source = importlib.import_module(f"toolchain.sources.{prefix if prefix in own else 'reference'}")
    model: Model = source.load(text, weights=weights, seed=seed)
    return model
