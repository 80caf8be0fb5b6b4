"""Inputs that passes calibrate on: from a file, or made from the model, never those that validate it.

A file holds arrays (safetensors) or, for encoders of text, sentences (``.txt``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from enginewright.ground.errors import ToolchainError, raise_faults
from enginewright.ground.reading import read_tensors, read_text
from enginewright.ground.signature import Arrays, Dim, InputSpec, rows_of, shared_by_rows
from enginewright.passes.contract import Inputs
from enginewright.recipe import Recipe
from enginewright.sources.contract import Model

CALIBRATION_SEED, VALIDATION_SEED, TRAINING_SEED = 1_000, 2_000, 1_000_000
SPARE_SEED = 1_000_000_000
"""Added to the recipe's seed, so that the kinds of inputs never meet; training takes one seed after another."""


NUMPY_KNOWS = frozenset(
    (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.float64,
    )
)


def inputs(recipe: Recipe, model: Model) -> list[Inputs]:
    """Calibration calls as the recipe asks for them."""
    settings = recipe.head.calibration
    if settings.file is not None and settings.file.endswith(".txt"):
        return tensors(from_sentences(recipe.path(settings.file), model, settings.calls))
    if settings.file is not None:
        return calls_in(recipe.path(settings.file), model.inputs)[: settings.calls]
    return tensors(made(model, settings.calls, recipe.head.seed))


def made(model: Model, count: int, seed: int) -> list[Arrays]:
    """Calls made from the model; more than fit before those of validation are taken from behind all others."""
    room = VALIDATION_SEED - CALIBRATION_SEED
    first = model.batches(min(count, room), seed + CALIBRATION_SEED)
    return [*first, *model.batches(count - room, seed + SPARE_SEED)] if count > room else first


def drawn_by(recipe: Recipe, model: Model) -> Callable[[int, int], list[Inputs]] | None:
    """(count, seed) -> new calls like those of calibration; None where those are from a file."""
    if recipe.head.calibration.file is not None and model.realistic is None:
        return None
    return lambda count, seed: tensors(model.batches(count, recipe.head.seed + TRAINING_SEED + seed))


def calls_in(path: Path, specs: tuple[InputSpec, ...]) -> list[Inputs]:
    """The calls of a safetensors file; see ``from_file``."""
    return tensors(from_file(path, specs))


def tensors(calls: list[Arrays]) -> list[Inputs]:
    """The same calls for PyTorch."""
    return [{name: torch.from_numpy(array) for name, array in call.items()} for call in calls]


def from_sentences(path: Path, model: Model, count: int) -> list[Arrays]:
    """Read a text file, one sentence a line, into at most ``count`` calls of the model's typical batch.

    Raises:
        ToolchainError: not there, not text, or empty; or the model comes without a tokenizer.
    """
    if model.tokenize is None:
        raise ToolchainError(
            f"{path.name} is text, and {model.name} comes with no tokenizer to read it with",
            where=str(path),
            help="give a safetensors file with an array per input, or a model whose folder holds a tokenizer (hf:)",
        )
    text = read_text(path, what=path.name, absent=f"there is no calibration file {path.name!r}")
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise ToolchainError(f"{path.name} holds no sentences", where=str(path))
    batch = next(spec.sizes()[0] for spec in model.inputs)
    return [model.tokenize(sentences[i : i + batch]) for i in range(0, len(sentences), batch)][:count]


def from_file(path: Path, specs: tuple[InputSpec, ...]) -> list[Arrays]:
    """Read a safetensors file with one array per input, rows along the first (dynamic) dimension, cut into calls.

    Raises:
        ToolchainError: not there, cut short, an input missing or unknown, or of the wrong shape or type; all at once.
    """
    found_tensors = read_tensors(path, what=path.name, absent=f"there is no calibration file {path.name!r}")
    if strange := sorted({str(t.dtype) for t in found_tensors.values() if t.dtype not in NUMPY_KNOWS}):
        raise ToolchainError(f"{path.name} holds {', '.join(strange)}, which numpy does not know", where=str(path))
    arrays = {name: tensor.numpy() for name, tensor in found_tensors.items()}
    faults = []
    for spec in specs:
        if spec.name not in arrays:
            faults.append(ToolchainError(f"calibration file lacks input {spec.name!r}", where=str(path)))
            continue
        found = arrays[spec.name]
        wanted = tuple(d.name if isinstance(d, Dim) else d for d in spec.shape)
        fits = found.ndim == len(wanted) and all(
            isinstance(want, str) or want == size for want, size in zip(wanted, found.shape, strict=True)
        )
        if not fits:
            message = f"calibration input {spec.name!r} has shape {found.shape}; the model takes {shape_text(wanted)}"
            faults.append(ToolchainError(message, where=str(path)))
        elif found.dtype != spec.dtype:
            message = f"calibration input {spec.name!r} is {found.dtype}; the model takes {spec.dtype}"
            faults.append(ToolchainError(message, where=str(path)))
    strangers = sorted(arrays.keys() - {spec.name for spec in specs})
    faults += [ToolchainError(f"the model has no input {name!r}", where=str(path)) for name in strangers]
    batch, shared = rows_of(specs), shared_by_rows(specs)
    by_row = {spec.name: batch for spec in specs if isinstance(batch, Dim) and spec.name not in shared}
    rows = {len(arrays[name]) for name in by_row if name in arrays}
    if not faults and by_row and len(rows) != 1:
        faults.append(
            ToolchainError(f"calibration inputs have different numbers of rows: {sorted(rows)}", where=str(path))
        )
    raise_faults(faults)
    if not by_row:
        return [arrays]
    step = next(iter(by_row.values())).typical
    return [
        {name: array[i : i + step] if name in by_row else array for name, array in arrays.items()}
        for i in range(0, rows.pop(), step)
    ]


def shape_text(shape: tuple[int | str, ...]) -> str:
    """A shape with named dimensions, such as ``(batch, 1, 28, 28)``."""
    return f"({', '.join(str(size) for size in shape)}{',' if len(shape) == 1 else ''})"
