"""How far a training run has come, in one file: a run that was killed goes on and ends where it would have ended.

A safetensors file whose metadata say the step and what the run was started with; it is written under another name
and then renamed, so that what lies there is always whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import first_line, parse_json
from enginewright.ground.writing import in_words, make_folder, replacing

FILE = "distill.safetensors"


@dataclass
class State:
    """Where a run is, beside its weights.

    Args:
        step: steps done.
        losses: loss of the first step and of the last.
        cosines: of the gradients of output and alignment, where they were looked at.
        stopped: the step at which alignment stopped.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    stopped: int | None = None


def save(
    folder: Path,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: State,
    settings: str,
) -> None:
    """Write weights, the optimizer's state, the random state and ``state``, in place of what was there.

    Raises:
        ToolchainError: they cannot be written; the checkpoint before is whole.
    """
    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    tensors["random"] = torch.get_rng_state()
    whole = {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}
    with in_words("the checkpoint", folder / FILE):
        make_folder(folder)
    with replacing(folder / FILE, what="the checkpoint") as new:
        save_file(whole, new, metadata={"state": json.dumps(asdict(state)), "settings": settings})


def load(folder: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: str) -> State:
    """Go on where ``save`` was last called, or at the beginning where it never was.

    Raises:
        ToolchainError: what is there was not written by ``save``, or by a run with other settings, model or teacher.
    """
    path = folder / FILE
    if not path.exists():
        return State()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as cause:
        raise ToolchainError(f"{FILE} cannot be read: {cause.strerror or cause}", where=str(path)) from cause
    except (SafetensorError, ValueError, RuntimeError) as cause:
        raise ToolchainError(f"{FILE} is not a whole checkpoint: {cause}", where=str(path)) from cause
    if metadata.get("settings") != settings:
        raise ToolchainError(
            f"{FILE} is of another run: {difference(metadata.get('settings', '{}'), settings)}",
            where=str(path),
            help="give this run a folder of its own, or delete the file",
        )
    try:
        return restored(tensors, metadata, weights, optimizer)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as cause:
        raise ToolchainError(
            f"{FILE} is not a whole checkpoint: {first_line(cause)}",
            where=str(path),
            help="delete it, or copy it again",
        ) from cause


def restored(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> State:
    """Give weights, optimizer and the random state what ``save`` kept; raises where it is not whole."""
    kept = {name: tensors[f"weight.{name}"] for name in weights}
    state = State(**parse_json(metadata["state"], what="the state of the checkpoint"))
    moments = optimizer_state(tensors)
    if any(kept[name].shape != weight.shape for name, weight in weights.items()) or type(state.step) is not int:
        raise ValueError("a tensor of another shape, or no number of steps")
    fresh = optimizer.state_dict()
    optimizer.load_state_dict({"param_groups": fresh["param_groups"], "state": moments})
    torch.set_rng_state(tensors["random"])
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(kept[name])
    return state


def difference(old: str, new: str) -> str:
    """Which settings are not the same, both as JSON."""
    try:
        before, after = parse_json(old, what="what the checkpoint says of its run"), json.loads(new)
    except ToolchainError:
        before = None
    if not isinstance(before, dict):
        return "what it says of its run cannot be read"
    return ", ".join(key for key in sorted({*before, *after}) if before.get(key) != after.get(key))


def optimizer_state(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """What ``save`` kept of the optimizer, by parameter number."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensor
    return state
