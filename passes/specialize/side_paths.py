"""Layers with a low-rank product beside them that a call of the network steers: it brings matrices, or a strength.

A network takes what its layers need by name and leaves it where they find it while the call is made.

Shapes: ... leading sizes, D_in and D_out features of a layer, r rank, L layers that share an input, F adapter files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enginewright.passes.kernel.selection import never_called
from enginewright.passes.kernel.wrap import Around, Call


class Widths(NamedTuple):
    """Features that a layer reads and writes."""

    inputs: int
    outputs: int


class Entry(NamedTuple):
    """An input of the network, and the layer's own place in its first axis."""

    name: str
    place: int


@dataclass
class OngoingCall:
    """What the call that is being made brings for adapted layers, by the input's name; nothing between calls."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TakingAdapters(Around):
    """A network that takes what its adapted layers need; what a caller leaves out, they have defaults for."""

    call: OngoingCall
    names: tuple[str, ...]

    @property
    def adds(self) -> tuple[str, ...]:
        """Matrices or strengths."""
        return self.names

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """What the network gives with these adapters."""
        given = {name: inputs.pop(name, None) for name in self.names}
        self.call.tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        try:
            return forward(*args, **inputs)
        finally:
            self.call.tensors = {}


class SidePath(nn.Module, ABC):
    """A layer y = f(x) and what its adapter adds to that: f is linear or a convolution of 1 x 1, in any number format.

    Args:
        base: the layer.
        call: what is given with a call.
        widths: of the layer.
        product_first: multiply the two matrices before anything else: the same sum by another way, to hold the
            usual one against.
    """

    def __init__(self, base: nn.Module, call: OngoingCall, widths: Widths, *, product_first: bool) -> None:
        super().__init__()
        self.base, self.call, self.product_first = base, call, product_first
        self.in_features, self.out_features = widths

    @property
    def weight(self) -> Any:
        """The layer's own: some networks ask its type before they call the layer."""
        return self.base.weight

    @abstractmethod
    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (r, D_in), B (D_out, r), and what each of the r products is multiplied by, (r,), if anything."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D_in) or (B, D_in, h, w) -> (..., D_out) or (B, D_out, h, w)."""
        y: Tensor = self.base(x)
        down, up, scale = self.matrices(x)
        if scale is not None and (self.product_first or isinstance(self.base, nn.Conv2d)):
            down = scale[:, None] * down
        if isinstance(self.base, nn.Conv2d):
            cells = x.flatten(2)  # (B, D_in, h * w)
            return y + ((up @ down) @ cells if self.product_first else up @ (down @ cells)).view_as(y)
        if self.product_first:
            return y + F.linear(x, up @ down)
        narrow = F.linear(x, down)  # (..., r)
        return y + F.linear(narrow if scale is None else narrow * scale, up)


class GivenMatrices(SidePath):
    """A layer whose adapter's matrices are given with each call; without them it answers as it would alone.

    Args:
        base: the layer.
        call: has inputs (L, r, D_in) with this layer's A in one place, and (L, D_out, r) with its B.
        widths: of the layer.
        down: where its A is.
        up: where its B is.
        rank: r.
        product_first: as in ``SidePath``.
    """

    def __init__(
        self,
        base: nn.Module,
        call: OngoingCall,
        widths: Widths,
        *,
        down: Entry,
        up: Entry,
        rank: int,
        product_first: bool = False,
    ) -> None:
        super().__init__(base, call, widths, product_first=product_first)
        self.down, self.up, self.rank = down, up, rank

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (r, D_in) and B (D_out, r) of the call; zeros where it has none."""
        shapes = {self.down: (self.rank, self.in_features), self.up: (self.out_features, self.rank)}
        given = self.call.tensors
        down, up = (
            given[entry.name][entry.place].to(x.dtype) if entry.name in given else x.new_zeros(shape)
            for entry, shape in shapes.items()
        )
        return down, up, None


class GivenStrength(SidePath):
    """A layer with the matrices of some adapter files beside it, whose strengths are given with each call; 1 without.

    Args:
        base: the layer.
        call: has an input (F,) with the strength of each file.
        widths: of the layer.
        down: the A of all files, one below the other, (r, D_in).
        up: their B, side by side, (D_out, r).
        ranks: how many of the r are of each file.
        name: of the input.
        product_first: as in ``SidePath``.
    """

    down: Tensor
    up: Tensor
    file: Tensor

    def __init__(
        self,
        base: nn.Module,
        call: OngoingCall,
        widths: Widths,
        *,
        down: Tensor,
        up: Tensor,
        ranks: Sequence[int],
        name: str,
        product_first: bool = False,
    ) -> None:
        super().__init__(base, call, widths, product_first=product_first)
        self.down, self.up = (nn.Parameter(each.detach(), requires_grad=False) for each in (down, up))
        counts = torch.tensor(ranks, device=down.device)
        self.register_buffer("file", torch.arange(len(ranks), device=down.device).repeat_interleave(counts))
        self.name = name

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (r, D_in) and B (D_out, r) of all files, and their strengths (r,)."""
        strength = self.call.tensors.get(self.name)
        scale = x.new_ones(self.file.shape) if strength is None else strength.to(x.dtype)[self.file]
        return self.down.to(x.dtype), self.up.to(x.dtype), scale


def adaptable(model: nn.Module) -> tuple[dict[str, Widths], dict[str, str]]:
    """Layers that a side path can be put beside, quantized ones too, and others that adapters may be for, and why not.

    Of a layer that is made of several the whole is meant, not its parts.
    """
    found: dict[str, Widths] = {}
    others: dict[str, str] = {}
    for path, module in outermost(model):
        kind = type(module).__name__
        if isinstance(module, nn.Linear) and (reason := never_called(module)):
            others[path] = reason
        elif isinstance(module, nn.Conv2d):
            if (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1):
                found[path] = Widths(module.in_channels, module.out_channels)
            else:
                others[path] = (
                    f"a {kind} of more than one cell: no engine takes the kernel as an input; fold_adapters can"
                )
        elif isinstance(module, nn.Conv1d | nn.Conv3d | nn.Embedding):
            others[path] = f"a {kind}: only linear layers and convolutions of 1 x 1 have a side path"
        else:
            found[path] = Widths(*(getattr(module, name) for name in SIZES))
    return found, others


SIZES = ("in_features", "out_features")
"""What layers call the features that they read and write, quantized ones too."""


def outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with weights of two sizes, by path; none of those within another."""
    around = ""
    for path, module in model.named_modules():
        if around and path.startswith(around):
            continue
        sized = all(isinstance(getattr(module, name, None), int) for name in SIZES)
        if sized or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
            around = f"{path}."
            yield path, module
