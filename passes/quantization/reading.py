"""What linear layers read on calibration inputs: rows of it, and who else reads the same tensor.

Shapes: R rows (all leading dimensions together), K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from enginewright.passes.contract import Context
from enginewright.passes.kernel.selection import check_patterns, excluded_by, never_called, other_matrices
from enginewright.passes.quantization.scales import some_rows
from enginewright.passes.quantization.smoothing import scales_with_weight

TRAIL = "_enginewright_trail"
"""The attribute of a tensor under which its readers are noted, so that the note goes when the tensor does."""

LOOKS = {
    torch.Tensor.size,
    torch.Tensor.dim,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")),
}
"""Questions to a tensor that do not read its values."""


@dataclass(frozen=True)
class Group:
    """Layers that read one and the same tensor.

    Args:
        layers: their paths.
        norm: the norm that wrote it, where nothing but these layers reads what it writes; else None.
    """

    layers: tuple[str, ...]
    norm: str | None


@dataclass(frozen=True)
class Reading:
    """Rows (R, K) that each layer read, by path, and the layers in groups; those never called are in neither."""

    rows: Mapping[str, Tensor]
    groups: tuple[Group, ...]


@dataclass
class Trail:
    """Who wrote a tensor, which layers and how many functions read it."""

    norm: str | None
    layers: list[str] = field(default_factory=list)
    reads: int = 0


class Watch(TorchFunctionMode):
    """Counts the functions that read a tensor with a trail."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the readers and call on."""
        if not self.paused and func not in LOOKS:
            for trail in trails_in((args, kwargs)):
                trail.reads += 1
        return func(*args, **(kwargs or {}))


def trails_in(value: Any) -> Iterator[Trail]:
    """Trails of the tensors in nested arguments, or in a model's output."""
    if isinstance(value, Tensor):
        if (trail := getattr(value, TRAIL, None)) is not None:
            yield trail
    elif isinstance(value, Mapping):
        yield from trails_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from trails_in(part)


def linear_layers(
    model: nn.Module, *, exclude: Sequence[str], smallest: int, fits: Callable[[nn.Linear], str] = lambda layer: ""
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers to quantize, by path, and the layers left alone with the reason.

    Args:
        model: to look through.
        exclude: glob patterns of paths that stay.
        smallest: layers with fewer weights stay.
        fits: why a pass cannot take a layer; empty when it can.
    """
    layers: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = excluded_by(path, exclude)
            if not reason and module.weight.numel() < smallest:
                reason = f"has {module.weight.numel()} weights, fewer than {smallest}"
            if reason := reason or never_called(module) or fits(module):
                skipped[path] = reason
            else:
                layers[path] = module
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
            skipped[path] = f"{type(module).__name__}: only linear layers are quantized"
    skipped |= other_matrices(model, {*layers, *skipped}, "only linear layers are quantized")
    check_patterns(exclude, [*layers, *skipped], what="linear layer")
    return layers, skipped


def read(model: nn.Module, layers: Mapping[str, nn.Linear], context: Context) -> Reading:
    """Run the calibration calls; keeps evenly spaced rows of each call, and always the row of the largest value."""
    rows: dict[str, list[Tensor]] = {}
    trails: list[Trail] = []
    watch = Watch()

    def wrote(norm: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            trails.append(Trail(norm))
            setattr(output, TRAIL, trails[-1])

    def reads(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        trail = getattr(inputs[0], TRAIL, None)
        if trail is None:
            trail = Trail(None)
            trails.append(trail)
            setattr(inputs[0], TRAIL, trail)
        trail.layers.append(path)
        watch.paused = True
        rows.setdefault(path, []).append(some_rows(inputs[0].detach().flatten(0, -2).float()))
        watch.paused = False

    norms = {path: module for path, module in model.named_modules() if scales_with_weight(module)}
    hooks = [layer.register_forward_pre_hook(partial(reads, path)) for path, layer in layers.items()]
    hooks += [norm.register_forward_hook(partial(wrote, path)) for path, norm in norms.items()]
    try:
        with torch.no_grad():
            for number, inputs in enumerate(context.calibration):
                context.say(number, len(context.calibration), "calibrating")
                with watch:
                    output = model(**inputs)
                for trail in trails_in(output):
                    trail.reads += 1
    finally:
        for hook in hooks:
            hook.remove()
    found = {path: torch.cat(rows[path]) for path in layers if path in rows}
    return Reading(rows=found, groups=tuple(grouped(found, trails)))


def grouped(layers: Iterable[str], trails: Sequence[Trail]) -> Iterator[Group]:
    """Layers that ever read the same tensor together, in the model's order."""
    sets: dict[str, set[str]] = {path: {path} for path in layers}
    for trail in trails:
        joined = set().union(*(sets[path] for path in trail.layers))
        for path in joined:
            sets[path] = joined
    done: set[str] = set()
    for path, members in sets.items():
        if path not in done:
            done |= members
            yield Group(layers=tuple(p for p in sets if p in members), norm=sole_norm(members, trails))


def sole_norm(layers: set[str], trails: Sequence[Trail]) -> str | None:
    """The norm that writes all that these layers read, if nothing else reads what it writes."""
    norms = {trail.norm for trail in trails if layers & set(trail.layers)}
    if len(norms) != 1 or None in norms:
        return None
    [norm] = norms
    written = [trail for trail in trails if trail.norm == norm]
    alone = all(set(trail.layers) <= layers and trail.reads == len(trail.layers) for trail in written)
    return norm if alone else None
