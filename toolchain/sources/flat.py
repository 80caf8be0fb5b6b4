"""Networks called with plain tensors by name: what an exporter can trace and an engine can take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec
from enginewright.sources.arguments import OTHERWISE, left_out
from enginewright.sources.contract import Interface, LeftOut, interface_of

Config = Mapping[str, Any]
"""A model's configuration, with the defaults of what its file leaves out."""

BATCH = Dim(name="batch", low=1, typical=2, high=8)
"""Guidance doubles the batch, so one picture is a batch of two."""


class Flat(nn.Module):
    """Wraps a network whose ``forward`` also takes mappings, tuples and flags.

    A subclass writes ``forward`` with one tensor for each input. Floats go in and come out as float32, whatever the
    type of the weights: numpy has no bfloat16, and metrics want no rounding beyond the network's own.

    Args:
        inner: the network; an engine is put in its place.
    """

    further: ClassVar[tuple[str, ...]] = ()
    """Fields of the network's output that are no tensors there, but are here; they come last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def like(self, x: Tensor) -> Tensor:
        """In the type of the weights."""
        return x.to(next(p.dtype for p in self.inner.parameters() if p.is_floating_point()))

    def ask(self, **arguments: Any) -> Tensor:
        """Call the network and take the tensor that it gives."""
        output: Tensor = self.inner(**arguments, return_dict=False)[0]
        return output.float()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of network.

    Args:
        flat: the wrapper.
        inputs: configuration -> input contract, in the order of the wrapper's ``forward``.
    """

    flat: Callable[[Any], Flat]
    inputs: Callable[[Config], tuple[InputSpec, ...]]


def interface(
    flat: Flat, inputs: Mapping[str, Tensor], config: Config
) -> tuple[Interface, tuple[str, ...], tuple[LeftOut, ...]]:
    """How the wrapped network is called, as the wrapper does; names for the outputs; arguments that it never gets.

    A graph's input and output cannot share a name: the second ``sample`` of a U-Net is ``out_sample``.
    """
    handed: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module, args
        handed.update({name: value for name, value in kwargs.items() if name != "return_dict"})
        raise Noted

    hook = flat.inner.register_forward_pre_hook(note, with_kwargs=True)
    try:
        flat(**inputs)
    except Noted:
        pass
    finally:
        hook.remove()
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    found, outputs = interface_of(flat.inner, handed, path="inner", config=public)
    keys = (*outputs, *flat.further)
    names = tuple(f"out_{key}" if key in inputs else key for key in keys)
    given = {name for name, value in handed.items() if value is not None}
    return replace(found, keys=keys), names, left_out(flat.inner, given, lambda name: OTHERWISE)


class Noted(Exception):  # noqa: N818 - no error
    """The arguments were seen; the network need not run."""


def side(name: str, size: int, step: int = 1, *, most: int | None = None) -> Dim:
    """A height or width in multiples of ``step``: half to double the size that the network was trained at."""
    size = max(size // step, 1) * step
    high = 2 * size if most is None else max(min(2 * size, most // step * step), size)
    return Dim(name=name, low=max(size // 2 // step, 1) * step, typical=size, high=high, multiple_of=step)


def sides(size: int | list[int] | tuple[int, int] | None, default: int) -> tuple[int, int]:
    """Height and width from a configuration's ``sample_size``."""
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return int(size or default), int(size or default)


def example_of(specs: tuple[InputSpec, ...]) -> dict[str, Tensor]:
    """Zeros of each input's typical shape and type, for a call on shapes alone."""
    return {spec.name: torch.zeros(spec.sizes(), dtype=getattr(torch, spec.dtype)) for spec in specs}
