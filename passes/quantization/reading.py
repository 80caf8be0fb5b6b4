"""What linear layers read on calibration inputs: statistics of it, and who else reads the same tensor.

Shapes: R rows (all leading dimensions together), K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from enginewright.passes.contract import Context
from enginewright.passes.kernel.observe import Look, first_argument, observe, reading, rounds, tensors_in
from enginewright.passes.kernel.selection import check_patterns, excluded_by, never_called, other_matrices
from enginewright.passes.kernel.statistics import InputStatistics, bytes_of, rows_of
from enginewright.passes.quantization.smoothing import scales_with_weight

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
        self.trails: list[Trail] = []
        self.marked = WeakTensorKeyDictionary()  # goes with the tensor, and with this run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the readers and call on."""
        if not self.paused and func not in LOOKS:
            self.count((args, kwargs))
        return func(*args, **(kwargs or {}))

    def count(self, value: Any) -> None:
        """One more reader of each marked tensor in nested arguments, or in a model's output."""
        for tensor in tensors_in(value):
            if (trail := self.marked.get(tensor)) is not None:
                trail.reads += 1

    def mark(self, tensor: Tensor, norm: str | None) -> Trail:
        """A new trail of a tensor."""
        self.trails.append(Trail(norm))
        self.marked[tensor] = self.trails[-1]
        return self.trails[-1]

    def wrote(self, norm: str, inputs: Any, named: Any, output: Any) -> None:
        """A norm gave a tensor."""
        if isinstance(output, Tensor):
            self.mark(output, norm)

    def reads(self, path: str, inputs: Any, named: Any) -> None:
        """A layer is called."""
        tensor = first_argument(inputs, named)
        trail = self.marked.get(tensor)
        (self.mark(tensor, None) if trail is None else trail).layers.append(path)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What reads tensors in this block does not count."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


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


def read(
    model: nn.Module, layers: Mapping[str, nn.Linear], context: Context, seen: Mapping[str, InputStatistics]
) -> list[Group]:
    """Run the calibration calls and find which layers read the same tensor, while some of them fill their statistics.

    Args:
        model: that has the layers.
        layers: by path.
        context: has the calls.
        seen: statistics to fill, by path.
    """
    watch = Watch()

    def reads(path: str, inputs: Any, named: Any) -> None:
        watch.reads(path, inputs, named)
        if path in seen:
            with watch.pause():
                seen[path].add(rows_of(first_argument(inputs, named)).float())

    norms = {path: module for path, module in model.named_modules() if scales_with_weight(module)}
    looks = [Look(layer, before=partial(reads, path)) for path, layer in layers.items()]
    looks += [Look(norm, after=partial(watch.wrote, path)) for path, norm in norms.items()]
    with watch:
        observe(model, looks, context, doing="calibrating", each=watch.count)
    called = {path for trail in watch.trails for path in trail.layers}
    return list(grouped([path for path in layers if path in called], watch.trails))


def readings(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    context: Context,
    *,
    histogram: bool = False,
    products: bool = False,
) -> Iterator[tuple[Group, dict[str, InputStatistics]]]:
    """The layers in groups, and what was seen of the input of each, by path; those never called are in none.

    As many groups are looked at in one run of the calls as fit into memory.

    Args:
        model: that has the layers.
        layers: by path.
        context: has the calls, and the seed of samples.
        histogram: whether percentiles are to be asked for.
        products: whether X^T X is.
    """

    def empty(paths: Iterable[str]) -> dict[str, InputStatistics]:
        return {path: InputStatistics(context.seed, histogram=histogram, products=products) for path in paths}

    sizes = {
        path: bytes_of(layer.in_features, histogram=histogram, products=products) for path, layer in layers.items()
    }
    if len(rounds(sizes)) <= 1:
        seen = empty(layers)
        for group in read(model, layers, context, seen):
            yield group, {path: seen.pop(path) for path in group.layers}
        return
    groups = {group.layers[0]: group for group in read(model, layers, context, {})}
    whole = {first: sum(sizes[path] for path in group.layers) for first, group in groups.items()}
    for together in rounds(whole):
        seen = empty(path for first in together for path in groups[first].layers)
        looks = [reading(layers[path], statistics) for path, statistics in seen.items()]
        observe(model, looks, context, doing="calibrating")
        for first in together:
            yield groups[first], {path: seen.pop(path) for path in groups[first].layers}


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
