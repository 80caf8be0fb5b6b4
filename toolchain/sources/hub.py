"""Checkpoint folders: local ones, or a hub's, fetched when they are asked for by name and at no other time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.errors import ToolchainError, require

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def folder_of(text: str, patterns: Sequence[str]) -> Path:
    """The folder that a model string names.

    Args:
        text: a local folder, or ``owner/name`` on the hub.
        patterns: files wanted from the hub.

    Raises:
        ToolchainError: no such folder, and the hub does not have it or cannot be reached.
    """
    folder = Path(text)
    if folder.is_dir():
        return folder
    if not text or not HUB_ID.fullmatch(text) or folder.is_file():
        raise ToolchainError(f"there is no folder {text!r}", help="name the folder that save_pretrained wrote")
    hub: Any = require("huggingface_hub", extra="transformers")
    try:
        return Path(hub.snapshot_download(text, allow_patterns=list(patterns)))
    except Exception as cause:  # its errors, those of its HTTP library and OSError have no common base but this
        first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ToolchainError(
            f"there is no local folder {text!r}, and the hub did not give it: {first}",
            help="check the name and the connection, or download it elsewhere and name the folder",
        ) from cause
