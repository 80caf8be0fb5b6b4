"""Folders that lie here, or are fetched from the model hub by their name; nothing else reaches for the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from enginewright.ground.errors import ToolchainError, require
from enginewright.ground.reading import expanded

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""What can be the name of a repository on the hub: ``owner/name``."""


def folder_of(text: str, patterns: Sequence[str]) -> Path:
    """A local folder as it is, or the hub's repository of that name, of which only ``patterns`` are fetched.

    Args:
        text: a folder, or ``owner/name`` on the hub.
        patterns: files to fetch, such as ``*.json``; a local folder is not searched for them.

    Raises:
        ToolchainError: no such folder, and no such repository; or the hub cannot be reached.
    """
    folder = expanded(text)
    if text and folder.is_dir():
        return folder
    if not REPOSITORY.fullmatch(text):
        raise ToolchainError(
            f"there is no local folder {text!r}, and a name on the hub looks like 'owner/name'",
            help="check the path; a model is a folder, not a file" if folder.exists() else "check the path",
        )
    hub = require("huggingface_hub", extra="diffusers")
    errors = require("huggingface_hub.errors", extra="diffusers")
    try:
        return Path(hub.snapshot_download(text, allow_patterns=list(patterns)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as cause:
        raise ToolchainError(
            f"there is no local folder {text!r}, and the hub has no repository of that name that can be read",
            help="check the path or the name; for a private or gated repository, log in with 'hf auth login'",
        ) from cause
    except Exception as cause:  # each version of the hub's library has other errors for a failed download
        raise ToolchainError(
            f"there is no local folder {text!r}, and the hub could not be reached ({type(cause).__name__})",
            help="give the path of a folder that holds the model, or unset HF_HUB_OFFLINE and check the connection",
        ) from cause
