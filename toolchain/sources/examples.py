"""An input contract from example tensors, and an interface from what a module answers to them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError, raise_faults
from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.sources.contract import LIBRARIES, Interface
from enginewright.targets.pytorch_engine import flat

HIGHEST_BATCH = 64
"""Largest batch where nobody says one, unless the example is larger."""

DynamicAxes = Mapping[str, Mapping[int, tuple[str, int, int] | tuple[str, int, int, int]]]


def by_name(module: nn.Module, inputs: Any, *, where: str) -> dict[str, Tensor]:
    """Example inputs by argument name, checked against ``forward``.

    Args:
        module: the network.
        inputs: a mapping, or a sequence in the order of ``forward``'s parameters.
        where: for errors.

    Raises:
        ToolchainError: they do not fit ``forward``, or are no tensors that numpy knows, on the CPU.
    """
    signature = inspect.signature(module.forward)
    if isinstance(inputs, tuple | list):
        named = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(inputs) > len(named):
            raise unfit(f"there are {len(inputs)} example inputs", signature, where)
        inputs = dict(zip(named, inputs, strict=False))
    if not isinstance(inputs, Mapping):
        message = f"the example inputs are a {type(inputs).__name__}; they must be a dict or a tuple of tensors"
        raise ToolchainError(message, where=where)
    try:
        signature.bind(**inputs)
    except TypeError as cause:
        raise unfit(f"the example inputs do not fit: {cause}", signature, where) from cause
    if not inputs:
        raise unfit("there are no example inputs", signature, where)
    raise_faults([fault for name, value in inputs.items() for fault in faults_of(name, value, where)])
    return dict(inputs)


def unfit(message: str, signature: inspect.Signature, where: str) -> ToolchainError:
    """The error for inputs that ``forward`` does not take."""
    names = ", ".join(str(parameter) for parameter in signature.parameters.values())
    return ToolchainError(message, where=where, help=f"forward takes ({names})")


def faults_of(name: str, value: Any, where: str) -> list[ToolchainError]:
    """What makes a value no example input."""
    if not isinstance(value, Tensor):
        message = f"example input {name!r} is {'None' if value is None else f'a {type(value).__name__}'}, no tensor"
        advice = "wrap the module: its forward takes tensors alone, and sets what never changes"
        return [ToolchainError(message, where=where, help=advice)]
    faults = []
    if value.device.type != "cpu":
        message = f"example input {name!r} is on {value.device}"
        faults.append(ToolchainError(message, where=where, help="give module and inputs on the CPU"))
    if not hasattr(np, dtype_name(value)):
        faults.append(ToolchainError(f"example input {name!r} is {value.dtype}, which numpy lacks", where=where))
    if not value.numel():
        faults.append(ToolchainError(f"example input {name!r} is empty, {tuple(value.shape)}", where=where))
    return faults


def dtype_name(tensor: Tensor) -> str:
    """Numpy's name of a tensor's type, where numpy has it."""
    return str(tensor.dtype).removeprefix("torch.")


def input_specs(
    inputs: Mapping[str, Tensor],
    dynamic: DynamicAxes | None,
    ranges: Mapping[str, tuple[float, float]],
    *,
    where: str,
) -> tuple[InputSpec, ...]:
    """The contract that examples stand for.

    Args:
        inputs: examples by name.
        dynamic: axes that may change; None: the batch, if there is one.
        ranges: of values, by name.
        where: for errors.

    Raises:
        ToolchainError: an axis, a range or a name that does not go with the examples; all at once.
    """
    axes = batch_axes(inputs) if dynamic is None else dynamic
    faults = [
        ToolchainError(f"{key} names {name!r}, which is no input", where=where, help=f"inputs: {', '.join(inputs)}")
        for key, given in (("dynamic", axes), ("ranges", ranges))
        for name in given
        if name not in inputs
    ]
    sizes: dict[str, Dim] = {}
    for name in inputs.keys() & axes.keys():
        for axis, entry in axes[name].items():
            faults += axis_faults(name, inputs[name], axis, entry, sizes, where)
    raise_faults(faults)
    return tuple(
        InputSpec(
            name=name,
            shape=tuple(
                sizes[axes[name][axis][0]] if axis in axes.get(name, {}) else size
                for axis, size in enumerate(tensor.shape)
            ),
            dtype=dtype_name(tensor),
            **value_range(tensor, ranges.get(name)),
        )
        for name, tensor in inputs.items()
    )


def batch_axes(inputs: Mapping[str, Tensor]) -> DynamicAxes:
    """Axis 0 of every input, if all have one of the same size; else none."""
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in inputs.values()}
    size = sizes.pop()
    if sizes or size is None:
        return {}
    return {name: {0: ("batch", 1, max(HIGHEST_BATCH, size))} for name in inputs}


def axis_faults(
    name: str, tensor: Tensor, axis: Any, entry: Any, sizes: dict[str, Dim], where: str
) -> list[ToolchainError]:
    """What is wrong with one dynamic axis; a good one is put into ``sizes``."""
    what = f"dynamic axis {axis!r} of {name!r}"
    if not (isinstance(axis, int) and 0 <= axis < tensor.ndim):
        return [ToolchainError(f"{what}: the example's shape is {tuple(tensor.shape)}", where=where)]
    kinds = [type(part) for part in entry] if isinstance(entry, Sequence) else []
    if kinds not in ([str, int, int], [str, int, int, int]):
        message = f"{what} is {entry!r}; it must be (name, smallest, largest) or (name, smallest, largest, multiple)"
        return [ToolchainError(message, where=where)]
    dim = dim_of(entry, tensor.shape[axis])
    if not dim.name.isidentifier():
        return [ToolchainError(f"{what} is called {dim.name!r}, which is no plain name", where=where)]
    if not 0 < dim.low <= dim.typical <= dim.high:
        return [ToolchainError(f"{what} goes from {dim.low} to {dim.high}; the example has {dim.typical}", where=where)]
    if dim.multiple_of < 1 or dim.typical % dim.multiple_of:
        message = f"{what} comes in multiples of {dim.multiple_of}; the example has {dim.typical}"
        return [ToolchainError(message, where=where)]
    if sizes.setdefault(dim.name, dim) != dim:
        return [ToolchainError(f"{what} is {dim}, elsewhere {sizes[dim.name]}: one name is one size", where=where)]
    return []


def dim_of(entry: Sequence[Any], size: int) -> Dim:
    """A dimension as it was declared, with the example's size as the typical one."""
    name, low, high, *step = entry
    return Dim(name=name, low=low, typical=size, high=high, multiple_of=step[0] if step else 1)


def value_range(tensor: Tensor, given: tuple[float, float] | None) -> dict[str, Any]:
    """Limits that values are drawn from: those given, or else a guess, for integers the example's own."""
    if given is not None:
        return {"low": given[0], "high": given[1]}
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return {"low": None, "high": None, "guessed": True}
    return {"low": min(0, int(tensor.min())), "high": int(tensor.max()) + 1, "guessed": True}


def arrays_of(inputs: Mapping[str, Tensor]) -> Arrays:
    """Example tensors as arrays of their own."""
    return {name: tensor.detach().numpy().copy() for name, tensor in inputs.items()}


def interface_of_answer(
    answer: Any, inputs: Mapping[str, Tensor], names: tuple[str, ...], *, where: str
) -> tuple[Interface, tuple[str, ...]]:
    """How a module answers a call, and names for its outputs.

    Args:
        answer: what it returned.
        inputs: what it was called with.
        names: for the outputs; empty: from the answer.
        where: for errors.

    Raises:
        ToolchainError: no tensor came back, or not as many as there are names.
    """
    if strange := strangers(answer):
        raise ToolchainError(
            f"the module returned a {strange[0]}, which no engine can give back",
            where=where,
            help="wrap the module so that it returns the tensors of that by themselves; a model that returns a cache "
            "of keys and values returns none with use_cache=False",
        )
    tensors = flat(answer)
    if not tensors:
        raise ToolchainError(
            f"the module returned a {type(answer).__name__} without a tensor",
            where=where,
            help="return a tensor, or a tuple, list, dict or dataclass that holds some",
        )
    if dataclasses.is_dataclass(answer) and not isinstance(answer, Mapping):
        answer = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    returns, found = "tuple", tuple(f"output_{i}" for i in range(len(tensors)))
    if isinstance(answer, Tensor):
        returns, found = "tensor", ("output",)
    elif isinstance(answer, Mapping) and len(tensors) == sum(isinstance(v, Tensor) for v in answer.values()):
        library = type(answer).__module__.partition(".")[0]
        known = library in LIBRARIES
        returns = f"{type(answer).__module__}:{type(answer).__qualname__}" if known else "dict"
        found = tuple(str(key) for key, value in answer.items() if isinstance(value, Tensor))
    if names and len(names) != len(tensors):
        raise ToolchainError(
            f"outputs names {len(names)}: {list(names)}; the module returned {len(tensors)}", where=where
        )
    return Interface(arguments=tuple(inputs), returns=returns, keys=found), names or found


def strangers(answer: Any) -> list[str]:
    """Names of the types in an answer that are no tensors, no containers of them, and no plain values to leave out."""
    if answer is None or isinstance(answer, Tensor | int | float | complex | str | bytes):
        return []
    if dataclasses.is_dataclass(answer) and not isinstance(answer, type | Mapping):
        return [name for field in dataclasses.fields(answer) for name in strangers(getattr(answer, field.name))]
    if isinstance(answer, Mapping):
        return [name for value in answer.values() for name in strangers(value)]
    if isinstance(answer, tuple | list):
        return [name for value in answer for name in strangers(value)]
    return [type(answer).__name__]


def checked(
    realistic: Callable[[int, int], Sequence[Mapping[str, Any]]], specs: tuple[InputSpec, ...], *, where: str
) -> Callable[[int, int], list[Arrays]]:
    """A user's ``realistic`` that gives arrays, in the contract's types, or an error that says what is amiss."""
    known = {spec.name: spec for spec in specs}

    def batches(count: int, seed: int) -> list[Arrays]:
        calls = [{name: np.asarray(value) for name, value in call.items()} for call in realistic(count, seed)]
        if len(calls) != count:
            raise ToolchainError(f"realistic gave {len(calls)} sets of inputs; {count} were asked for", where=where)
        for call in calls:
            if call.keys() != known.keys():
                raise ToolchainError(f"realistic gave {sorted(call)}; the inputs are {sorted(known)}", where=where)
            for name, array in call.items():
                if not fits(array, known[name]):
                    message = f"realistic gave {name!r} as {array.dtype} {array.shape}; wanted {known[name]}"
                    raise ToolchainError(message, where=where)
        return calls

    return batches


def fits(array: np.ndarray[Any, Any], spec: InputSpec) -> bool:
    """Whether an array keeps to a contract's type and shape."""
    low, _, high = spec.limits()
    within = len(low) == array.ndim and all(a <= size <= b for a, size, b in zip(low, array.shape, high, strict=True))
    return within and array.dtype == spec.dtype
