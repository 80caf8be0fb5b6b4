"""From sentences to the inputs of a text encoder, by the tokenizer that its checkpoint carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enginewright.ground.errors import ToolchainError, require
from enginewright.ground.signature import Arrays, Dim, InputSpec

Tokenize = Callable[[Sequence[str]], Arrays]

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
"""One of these is in every folder that holds a tokenizer."""

MADE = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs that a tokenizer gives."""


def tokenizer_of(folder: Path, specs: tuple[InputSpec, ...], *, trust_remote_code: bool = False) -> Tokenize | None:
    """What turns sentences into one call; None for a folder without a tokenizer, or a model without token ids.

    The tokenizer is read when it is first used.

    Args:
        folder: holds the tokenizer's files.
        specs: the model's inputs; a call is padded to its longest sentence, or to the length that the model is for.
        trust_remote_code: run code that the folder brings along.
    """
    if not any(spec.name == "input_ids" for spec in specs) or not any(any(folder.glob(name)) for name in FILES):
        return None
    loaded: list[Any] = []

    def tokenize(sentences: Sequence[str]) -> Arrays:
        if not loaded:
            loaded.append(read(folder, trust_remote_code))
        return call_of(sentences, loaded[0], specs, where=str(folder))

    return tokenize


def read(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder; one without a token for padding pads with its last token, which the mask hides."""
    transformers: Any = require("transformers", extra="transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as cause:  # tokenizers raise bare exceptions of Rust
        first = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ToolchainError(f"the tokenizer cannot be read: {first}", where=str(folder)) from cause
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def call_of(sentences: Sequence[str], tokenizer: Any, specs: tuple[InputSpec, ...], *, where: str) -> Arrays:
    """One call: each input (B, N), sentences longer than the model takes cut off.

    Raises:
        ToolchainError: the model takes more than text, or the tokenizer knows tokens that it does not.
    """
    ids = next(spec for spec in specs if spec.name == "input_ids")
    if others := [spec.name for spec in specs if spec.name not in MADE]:
        raise ToolchainError(
            f"sentences cannot calibrate a model that takes {', '.join(others)} too",
            where=where,
            help="give a safetensors file with an array for each input",
        )
    length = ids.shape[1]
    found = tokenizer(
        list(sentences),
        padding=True if isinstance(length, Dim) else "max_length",
        truncation=True,
        max_length=length.high if isinstance(length, Dim) else length,
        return_tensors="np",
    )
    tokens = np.asarray(found["input_ids"])
    if ids.high is not None and tokens.max() >= ids.high:
        raise ToolchainError(
            f"the tokenizer gave token {tokens.max()}; the model knows {ids.high:g}",
            where=where,
            help="check that tokenizer and weights belong together",
        )
    return {spec.name: np.asarray(found.get(spec.name, np.zeros_like(tokens)), spec.dtype) for spec in specs}
