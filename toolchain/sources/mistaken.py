"""What was meant by a text that names no model: a folder or file without its source's prefix, a hub's name, a slip.

Nothing is loaded to find that out; the answer is the model string, or the command, that would work.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from enginewright import catalog, sources
from enginewright.ground.errors import ToolchainError, nearest
from enginewright.ground.reading import expanded

HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""What a name on the model hub looks like."""

WEB = re.compile(r"https?://(?:www\.)?huggingface\.co/([^/?#]+/[^/?#]+)")

CHOICES = (
    "hf:FOLDER or hf:OWNER/NAME, diffusers:FOLDER, py:FILE.py:FUNCTION, pt2:FILE.pt2, onnx:FILE.onnx, or a reference "
    "model ({models})"
)

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Files that torch.save writes, as a rule."""


def mistaken(text: str, *, where: str | None = None) -> ToolchainError | None:
    """The error for a text that names no model, with what would work; None for one that may.

    Args:
        text: what was given as a model.
        where: the place that it was given in, for the error.
    """
    prefix = text.partition(":")[0]
    if prefix in sources.prefixes() or prefix in catalog.entries("models") or prefix in catalog.entries("pipelines"):
        return None
    message, help_ = answer(text)
    return ToolchainError(message, where=where, help=help_)


def answer(text: str) -> tuple[str, str]:
    """What a text is instead of a model, and what to write."""
    if found := WEB.match(text):
        return (
            f"{text!r} is a page of the model hub",
            f"write hf:{found[1]} (a pipeline of diffusers: diffusers:{found[1]})",
        )
    if "\0" in text:
        return f"{text[:80]!r} can be no path", choices()
    try:
        path = expanded(text)
        if path.is_dir():
            return of_folder(text, path)
        if path.is_file():
            return of_file(text, path)
    except OSError:
        return f"{text[:80]!r} can be no path", choices()
    file, _, rest = text.partition(".py:")
    if rest:
        return f"{text!r} lacks the name of its source", f"write py:{file}.py:{rest}"
    name, colon, rest = text.partition(":")
    if colon and (tip := nearest(name, sources.prefixes())):
        return f"there is no source named {name!r}", f"{tip.removesuffix('?')}, as in {tip.split(chr(39))[1]}:{rest}?"
    if tip := nearest(name, [*catalog.entries("models"), *sources.prefixes()]):
        return f"there is no model named {text!r}", tip
    if path.suffix in (*PICKLED, *READERS) or text.startswith((".", "/", "~")):
        return f"there is no file or folder {text!r}", "check the path; a model is " + choices()
    if HUB.fullmatch(text):
        return (
            f"there is no model named {text!r}, and no such folder here",
            f"for the model hub write hf:{text}, or diffusers:{text} for a pipeline of diffusers",
        )
    return f"there is no model named {text!r}", choices()


def choices() -> str:
    """Everything that a model may be."""
    return CHOICES.format(models=", ".join(catalog.entries("models")))


def of_folder(text: str, folder: Path) -> tuple[str, str]:
    """A folder: whose it is tells which source reads it."""
    holds = {path.name for path in folder.iterdir()}
    if {"manifest.json", "recipe.toml"} <= holds:
        return (
            f"{text!r} is an artifact, which enginewright made",
            f"run it again with: enginewright run {folder / 'recipe.toml'} -o NEW; "
            f"or look at it with bench, compare, check or report",
        )
    if "model_index.json" in holds:
        return f"{text!r} is a pipeline of diffusers", f"write diffusers:{text}"
    if "adapter_config.json" in holds:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "MODEL"
        file = folder / "adapter_model.safetensors"
        return (
            f"{text!r} is an adapter (LoRA), and no whole model",
            f"write the model that it is for, and fold it in: hf:{base} --pass fold_adapters:file={file}",
        )
    if "config.json" in holds and "_class_name" in read_json(folder / "config.json"):
        return f"{text!r} is a network of diffusers", f"write diffusers:{text}"
    if holds & {"config.json", "modules.json"}:
        what = "a sentence encoder" if "modules.json" in holds else "a checkpoint of transformers"
        return f"{text!r} is {what}", f"write hf:{text}"
    files = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    if files:
        return f"{text!r} is a folder, and no model", of_file(str(files[0]), files[0])[1]
    return (
        f"{text!r} is a folder without a model: it has no config.json or model_index.json",
        "name the folder that save_pretrained wrote, as hf:FOLDER or diffusers:FOLDER",
    )


def of_file(text: str, path: Path) -> tuple[str, str]:
    """A file: what it ends with tells which source reads it."""
    if path.name in ("config.json", "model_index.json", "modules.json"):
        return of_folder(str(path.parent), path.parent)
    reader = of_archive if path.suffix in PICKLED else READERS.get(path.suffix)
    if reader is None:
        return f"{text!r} is a file that no source reads", f"a model is {choices()}"
    return reader(text, path)


def of_archive(text: str, path: Path) -> tuple[str, str]:
    """A file of torch.save, torch.export.save or torch.jit.save; told apart by what their archives hold."""
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    except (OSError, zipfile.BadZipFile):
        names = []
    if any(name.endswith("archive_format") for name in names):
        return f"{text!r} is an exported program", f"write pt2:{text}"
    kind = "a TorchScript file" if any("/code/" in name for name in names) else "a file of torch.save"
    return (
        f"{text!r} is {kind}, which is not read here: loading one may run code that it holds",
        "load it yourself, in a function of a Python file that returns the module and example inputs, and write "
        "py:FILE.py:FUNCTION",
    )


def of_weights(text: str, path: Path) -> tuple[str, str]:
    """Tensors alone; the folder may say whose."""
    if (path.parent / "config.json").is_file():
        return f"{text!r} holds the weights of a model", of_folder(str(path.parent), path.parent)[1]
    return (
        f"{text!r} holds tensors, and not how they are used",
        f"for a reference model write dit:SIZE --weights {text}; for your own, a function that loads them: "
        "py:FILE.py:FUNCTION",
    )


def of_python(text: str, path: Path) -> tuple[str, str]:
    """A Python file; its functions, without running it."""
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, ValueError):
        return f"{text!r} is not Python", "mend it, and write py:FILE.py:FUNCTION"
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    if len(names) == 1:
        return f"{text!r} is a Python file", f"write py:{text}:{names[0]}"
    listed = f"; it has {', '.join(names)}" if names else "; it has no function yet"
    return f"{text!r} is a Python file", f"write py:{text}:FUNCTION{listed}"


READERS: dict[str, Callable[[str, Path], tuple[str, str]]] = {
    ".py": of_python,
    ".safetensors": of_weights,
    ".onnx": lambda text, path: (f"{text!r} is an ONNX file", f"write onnx:{text}"),
    ".pt2": lambda text, path: (f"{text!r} is an exported program", f"write pt2:{text}"),
    ".toml": lambda text, path: (f"{text!r} is a recipe", f"write: enginewright run {text}"),
    ".gguf": lambda text, path: (
        f"{text!r} is a GGUF file, which is not read here",
        "take the checkpoint that it was made from, as hf:FOLDER or hf:OWNER/NAME",
    ),
    ".engine": lambda text, path: (f"{text!r} is a built engine", "name the model that it was built from"),
    ".plan": lambda text, path: (f"{text!r} is a built engine", "name the model that it was built from"),
    ".h5": lambda text, path: (
        f"{text!r} is a Keras file, which is not read here",
        "export it to ONNX, and write onnx:",
    ),
    ".tflite": lambda text, path: (
        f"{text!r} is for TensorFlow Lite, which is not read here",
        "start from PyTorch or ONNX",
    ),
}
"""What is said of a file, by its ending."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
