"""Folders of sentence-transformers: what ``modules.json`` puts behind the encoder becomes part of the network.

Served are Pooling, Dense, LayerNorm and Normalize (and Dropout, which does nothing). With any other module in it the
encoder is exported alone, and the report says what was left out.

Shapes: B sentences, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import read_json
from enginewright.sources.filling import fill, read_all, shards

MODULES = "modules.json"
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")


@dataclass(frozen=True, kw_only=True)
class SentenceFolder:
    """What a folder of sentence-transformers says beside its encoder.

    Args:
        encoder: where the encoder lies in it; empty for the folder itself.
        steps: what follows the encoder; empty where something in the folder is not known here.
        longest: tokens that sentences are cut to; None: not said.
        notes: what of the folder the exported network does not do, and what it does.
        files: what was read.
    """

    encoder: str
    steps: tuple[nn.Module, ...]
    longest: int | None
    notes: tuple[str, ...]
    files: tuple[Path, ...]

    def around(self, module: nn.Module) -> nn.Module:
        """The encoder with the steps behind it."""
        return SentenceEncoder(module, self.steps).eval()


class SentenceEncoder(nn.Module):
    """An encoder of text, and the steps that make one vector of a sentence's tokens."""

    def __init__(self, inner: nn.Module, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inner = inner
        self.steps = nn.ModuleList(steps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N), (B, N), (B, N) -> sentence vectors (B, D'), token vectors (B, N, D)."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.inner(input_ids=input_ids, attention_mask=attention_mask, **segments)[0]  # (B, N, D)
        vector = states
        for step in self.steps:
            vector = step(vector, attention_mask)
        return vector, states


class Pool(nn.Module):
    """One vector from the vectors of a sentence's tokens; several ways side by side."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, N, D), (B, N) -> (B, modes x D)."""
        mask = attention_mask[:, :, None].to(states.dtype)  # (B, N, 1)
        return torch.cat([POOLS[mode](states, mask) for mode in self.modes], dim=-1)


def mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens that count."""
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def mean_by_root(states: Tensor, mask: Tensor) -> Tensor:
    """The sum over tokens that count, by the root of their number."""
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9).sqrt()


def largest(states: Tensor, mask: Tensor) -> Tensor:
    """The largest value of each feature."""
    return states.masked_fill(mask == 0, -torch.inf).amax(1)


def first(states: Tensor, mask: Tensor) -> Tensor:
    """The first token that counts."""
    return picked(states, mask[:, :, 0].argmax(1))


def last(states: Tensor, mask: Tensor) -> Tensor:
    """The last token that counts."""
    return picked(states, (mask[:, :, 0] * places(states)).argmax(1))


def weighted(states: Tensor, mask: Tensor) -> Tensor:
    """The mean with weights 1, 2, ... from the first token that counts."""
    started = mask[:, :, 0].argmax(1)[:, None]  # (B, 1)
    weights = mask * (places(states) - started)[:, :, None]  # (B, N, 1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def places(states: Tensor) -> Tensor:
    """1, 2, ... N."""
    return torch.arange(1, states.shape[1] + 1, dtype=states.dtype)


def picked(states: Tensor, index: Tensor) -> Tensor:
    """One token of each sentence: (B, N, D), (B,) -> (B, D)."""
    return states.gather(1, index[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]


POOLS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": first,
    "max": largest,
    "mean": mean,
    "mean_sqrt_len_tokens": mean_by_root,
    "weightedmean": weighted,
    "lasttoken": last,
}
"""By the name that ``pooling_mode`` has; several are put together in this order."""


class Behind(nn.Module):
    """A step on the sentence's vector alone."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, vector: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, D) -> (B, D')."""
        del attention_mask
        found: Tensor = self.layers(vector)
        return found


class Normalize(nn.Module):
    """Makes each vector as long as 1."""

    def forward(self, vector: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return nn.functional.normalize(vector, dim=-1)


def read_modules(folder: Path) -> SentenceFolder | None:
    """What a folder's ``modules.json`` says; None for a folder without one.

    Raises:
        ToolchainError: it cannot be read, or points outside the folder, or the weights of a module do not fit.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    entries = content_of(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ToolchainError(f"{MODULES} is no list of modules", where=str(path))
    parts = [(str(entry.get("type", "")).rpartition(".")[2], str(entry.get("path", ""))) for entry in entries]
    if outside := [place for _, place in parts if Path(place).is_absolute() or ".." in Path(place).parts]:
        raise ToolchainError(f"{MODULES} points outside its folder: {outside[0]!r}; refused", where=str(path))
    (kind, encoder), *rest = parts or [("", "")]
    files, settings = [path], content_of(folder / encoder / "sentence_bert_config.json")
    strange = [name for name in ([] if kind == "Transformer" else [kind]) + [n for n, _ in rest] if name not in KNOWN]
    notes = prompts_of(folder)
    steps: tuple[nn.Module, ...] = ()
    if strange or not rest:
        behind = ", ".join(f"{name} ({place})" for name, place in rest) or "nothing"
        if rest:
            what = f"{', '.join(strange)} of {MODULES} is not known here"
            notes.append(f"{what}: what stands behind the encoder is left out ({behind}), so that its own outputs come")
    else:
        built = [KNOWN[name](folder / place) for name, place in rest]
        steps = tuple(step for step in built if step is not None)
        files += [file for _, place in rest for file in sorted((folder / place).glob("*")) if is_read(file)]
        names = ", ".join(name for name, _ in rest)
        notes.append(f"sentence_embedding is what {MODULES} makes of the encoder's tokens ({names})")
    longest = settings.get("max_seq_length") if isinstance(settings, dict) else None
    if isinstance(settings, dict) and settings.get("do_lower_case"):
        notes.append("sentence_bert_config.json asks for lower case (do_lower_case): give sentences so")
    return SentenceFolder(
        encoder=encoder,
        steps=steps,
        longest=longest if isinstance(longest, int) else None,
        notes=tuple(notes),
        files=tuple(files),
    )


def is_read(path: Path) -> bool:
    """Whether a module is made from a file."""
    return path.name == "config.json" or path.suffix == ".safetensors"


def prompts_of(folder: Path) -> list[str]:
    """What the folder puts before sentences, which an engine cannot."""
    found = content_of(folder / "config_sentence_transformers.json")
    prompts = found.get("prompts") if isinstance(found, dict) else None
    named = [name for name, text in (prompts or {}).items() if text] if isinstance(prompts, dict) else []
    if not named:
        return []
    return [f"the folder's prompts ({', '.join(named)}) are not put before sentences: give them so"]


def pooling(folder: Path) -> nn.Module:
    """Pooling, by its settings of today or of old."""
    settings = settings_of(folder)
    asked = settings.get("pooling_mode")
    if asked is None:
        old = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
        old |= {"weightedmean": "weightedmean_tokens"}
        asked = [mode for mode in POOLS if settings.get(f"pooling_mode_{old.get(mode, mode)}")] or ["mean"]
    modes = [asked] if isinstance(asked, str) else list(asked)
    if strange := [mode for mode in modes if mode not in POOLS]:
        raise ToolchainError(f"{folder.name} pools by {strange[0]!r}, which is not known here", where=str(folder))
    return Pool(modes)


def dense(folder: Path) -> nn.Module:
    """A linear layer and its activation."""
    settings = settings_of(folder)
    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise ToolchainError(f"{folder.name} has the activation {name!r}, which is not known here", where=str(folder))
    layer = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    filled(layer, "linear", folder)
    return Behind(layer, getattr(nn, name)())


def layer_norm(folder: Path) -> nn.Module:
    """A layer norm."""
    layer = nn.LayerNorm(settings_of(folder)["dimension"])
    filled(layer, "norm", folder)
    return Behind(layer)


def filled(layer: nn.Module, prefix: str, folder: Path) -> None:
    """Give a layer its weights, which stay in their file."""
    tensors = read_all(shards(folder, "model"))
    fill(layer, {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}, where=folder)


def settings_of(folder: Path) -> Mapping[str, Any]:
    """A module's ``config.json``."""
    found = content_of(folder / "config.json")
    if not isinstance(found, dict) or not found:
        raise ToolchainError(f"{folder.name} has no config.json with settings", where=str(folder))
    return found


def content_of(path: Path) -> Any:
    """Content of a JSON file; an empty mapping where there is no file."""
    return read_json(path, what=path.name) if path.is_file() else {}


KNOWN: Mapping[str, Callable[[Path], nn.Module | None]] = {
    "Pooling": pooling,
    "Dense": dense,
    "LayerNorm": layer_norm,
    "Normalize": lambda folder: Behind(Normalize()),
    "Dropout": lambda folder: None,
}
"""By the class that ``modules.json`` names: from the module's folder to a step."""
