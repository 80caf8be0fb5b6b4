"""What a source gives: a module with its input contract, and what is known about it."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import first_line
from enginewright.ground.signature import ROLES, Arrays, Dim, InputSpec, read_spec
from enginewright.passes.kernel.on_shapes import on_shapes
from enginewright.targets import stored
from enginewright.validation.contract import Workload
from enginewright.validation.inputs import draw
from enginewright.validation.sizes import hiding_a_row, with_ends

LIBRARIES = ("diffusers", "transformers")
"""Whose classes an interface may name: an engine builds no others."""

BY_HAND = "write a function that returns the module with example inputs, and use py:FILE:FUNCTION"
"""What helps with any module that a source cannot call."""


SAID = 300
"""Characters of a library's own error that ours quotes."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure from a paper and where it stands."""

    figure: str
    value: float | int | str
    source: str


@dataclass(frozen=True, kw_only=True)
class Interface:
    """How a module is called and what it gives back, so that an engine can stand in its place.

    Args:
        arguments: names of the arguments of ``forward``, in order. One that takes a mapping of inputs, such as
            ``added_cond_kwargs``, is given as one.
        returns: ``tensor``, ``tuple``, ``dict``, or the class of a model output, ``module:Class``, of diffusers or
            transformers.
        keys: fields of that class or keys of that dict, as many as there are outputs.
        module: path of the module that is replaced, inside the one that is exported; empty for that one itself.
        original: class of that module, as ``diffusers:Name`` or ``transformers:Name``; empty for others.
        config: its configuration, to build it again from.
    """

    arguments: tuple[str, ...]
    returns: str = "tensor"
    keys: tuple[str, ...] = ()
    module: str = ""
    original: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An argument of the original that engines have no input for, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network ready for the pipeline.

    Args:
        name: the string that asked for it, such as ``dit:digits``.
        module: in eval mode; ``forward`` takes the inputs by name.
        inputs: its input contract.
        outputs: names of what it returns, in order.
        weights: where the weights came from, in words.
        published: figures from its paper.
        task: a whole job, such as a sampling run with a judge.
        realistic: (count, seed) -> inputs like those in use; None where random ones must do.
        example: inputs that the model's owner gave, at typical sizes; None where nobody did.
        sized: (sizes of dimensions, seed) -> inputs like those in use at other than typical sizes; None where random
            ones must do.
        interface: how the original is called; None: by input names, giving a tensor or a tuple.
        tokenize: from sentences to one call, for encoders of text that come with a tokenizer.
        mask: the input (B, N) that marks real rows of outputs (B, N, ...), which are judged by those; empty: all are.
        carried: files that go into the artifact beside the engine, such as a tokenizer's.
        files: what it was read from, by path relative to the file or folder that was named: weights, configuration,
            code. Empty where nothing was named.
        left_out: arguments of the original that take tensors and are no inputs of this.
        notes: what else a user should know of how it was read, as sentences without full stops.
    """

    name: str
    module: nn.Module
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    weights: str
    published: tuple[Published, ...] = ()
    task: Workload | None = None
    realistic: Callable[[int, int], list[Arrays]] | None = None
    example: Arrays | None = None
    sized: Callable[[Mapping[str, int], int], Arrays] | None = None
    interface: Interface | None = None
    tokenize: Callable[[Sequence[str]], Arrays] | None = None
    mask: str = ""
    carried: tuple[Path, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def guessed(self) -> tuple[str, ...]:
        """Inputs whose random values keep to a range that nobody declared; none where calls are like those in use."""
        return () if self.realistic else tuple(spec.name for spec in self.inputs if spec.guessed)

    def batches(self, count: int, seed: int) -> list[Arrays]:
        """``count`` sets of inputs at typical sizes: realistic where the model can make them, else random."""
        if self.realistic:
            return self.realistic(count, seed)
        return [draw(self.inputs, seed=seed + i) for i in range(count)]

    def at(self, sizes: Mapping[str, int], seed: int) -> Arrays:
        """One set of inputs at the sizes given, typical where none is: with both ends of integers, and mixed masks."""
        drawn = draw(self.inputs, seed=seed, sizes=sizes)
        if self.sized is None:
            return with_ends(drawn, self.inputs)
        made = self.sized(sizes, seed)
        return {name: made.get(name, array) for name, array in drawn.items()}

    def held_out(self, count: int, seed: int) -> list[Arrays]:
        """``count`` sets of inputs to validate on, at typical sizes.

        The owner's own example comes first. Random inputs hold both ends of the integers' ranges; and where the
        contract allows a row of booleans that are all false, one more call has it.
        """
        first = [] if self.example is None else [self.example]
        calls = self.batches(max(count - len(first), 1), seed)
        if self.realistic:
            return [*first, *calls]
        calls = [with_ends(call, self.inputs) for call in calls]
        hidden = hiding_a_row(calls[0], self.inputs) if self.example is not None else None
        return [*first, *calls, *([hidden] if hidden is not None else [])]


def files_from(place: Path, paths: Iterable[Path]) -> dict[str, Path]:
    """Files by their path relative to ``place``, which is one of them or a folder around them."""
    return {os.path.relpath(path, place): path for path in paths}


def interface_of(
    module: nn.Module, inputs: Mapping[str, Any], *, path: str = "", config: Mapping[str, Any] | None = None
) -> tuple[Interface, tuple[str, ...]]:
    """Call a module on shapes alone and note how it answers.

    Args:
        module: the one that engines replace; its weights are not read.
        inputs: arguments by name; tensors (of any values) or mappings of tensors.
        path: its place inside the module that is exported.
        config: its configuration.

    Returns:
        The interface, and names for the outputs.
    """
    return interface_from(module, answer(module, inputs), path=path, config=config)


def answer(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a module returns: on shapes alone, unless shapes depend on what tensors hold; then of a real call.

    Raises:
        ToolchainError: it raises; said are its class, what it was called with, and why.
    """
    try:
        with torch.no_grad():
            try:
                with on_shapes(module), WeightsStay(module):
                    return module(**inputs)
            except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
                with WeightsStay(module):
                    return module(**inputs)
    except ToolchainError:
        raise
    except Exception as cause:  # whatever a model's own code raises
        given = ", ".join(f"{name} {described(value)}" for name, value in inputs.items())
        raise ToolchainError(
            f"{type(module).__name__} cannot be called with {given}: {reason_of(cause)}", help=BY_HAND
        ) from cause


class WeightsStay(TorchDispatchMode):
    """Refuses to write into a module's weights: they are constants in an engine, and lie in files that are only read.

    A write would end the process without a word.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.kind = type(module).__name__
        in_files = [pair for pair in module.named_buffers() if stored.place_of(pair[1])]
        self.names = {id(tensor): name for name, tensor in (*module.named_parameters(), *in_files)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, unless it writes into a weight."""
        written = zip(func._schema.arguments, args, strict=False) if func._schema.is_mutable else ()
        for argument, value in written:
            if argument.alias_info and argument.alias_info.is_write and id(value) in self.names:
                raise ToolchainError(
                    f"{self.kind} changes its own weights while it is called ({self.names[id(value)]}); those of an "
                    "engine are constants",
                    help=f"{BY_HAND}, with the weights as they are after a call",
                )
        return func(*args, **(kwargs or {}))


def described(value: Any) -> str:
    """A tensor's shape and type, or a value itself."""
    if not isinstance(value, Tensor):
        return f"= {value!r}"[:80]
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def reason_of(cause: BaseException) -> str:
    """What an exception says, in one line, cut where it gets long; after its type unless it reads as a sentence."""
    said = " ".join(str(cause).split())
    said = f"{said[:SAID]} …" if len(said) > SAID else said
    if type(cause) in (RuntimeError, ValueError) and said:
        return said
    return f"{type(cause).__name__}: {said}" if said else type(cause).__name__


def interface_from(
    module: nn.Module, result: Any, *, path: str = "", config: Mapping[str, Any] | None = None
) -> tuple[Interface, tuple[str, ...]]:
    """The interface of a module that answered a call with ``result``, and names for its outputs."""
    arguments = tuple(name for name in inspect.signature(module.forward).parameters if name not in ("args", "kwargs"))
    library = type(module).__module__.partition(".")[0]
    public = hasattr(sys.modules.get(library), type(module).__name__)
    original = f"{library}:{type(module).__name__}" if library in LIBRARIES and public else ""
    returns = "tensor"
    keys: tuple[str, ...] = ("output",)
    if isinstance(result, tuple | list):
        returns, keys = "tuple", tuple(f"output_{i}" for i, _ in enumerate(result))
    elif isinstance(result, Mapping):
        returns = f"{type(result).__module__}:{type(result).__qualname__}"
        keys = tuple(key for key, value in result.items() if isinstance(value, Tensor))
    found = Interface(
        arguments=arguments, returns=returns, keys=keys, module=path, original=original, config=config or {}
    )
    return found, keys


def write_interface(model: Model) -> dict[str, Any]:
    """What a manifest says about calling an engine, as JSON can hold it."""
    plain = Interface(
        arguments=tuple(spec.name for spec in model.inputs),
        returns="tensor" if len(model.outputs) == 1 else "tuple",
        keys=model.outputs,
    )
    content = {
        "inputs": [asdict(spec) for spec in model.inputs],
        "outputs": model.outputs,
        "call": vars(model.interface or plain),
    }
    plain_json: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return plain_json


def read_interface(manifest: Mapping[str, Any]) -> tuple[tuple[InputSpec, ...], tuple[str, ...], Interface]:
    """Inputs, names of outputs, and the interface, from a manifest.

    Raises:
        ToolchainError: the manifest lacks them.
    """
    if "interface" not in manifest:
        raise ToolchainError("the artifact does not say how its engines are called", help="export it again")
    content = manifest["interface"]
    try:
        inputs = tuple(read_spec(entry) for entry in content["inputs"])
        call = {**content["call"], **{key: tuple(content["call"][key]) for key in ("arguments", "keys")}}
        found = inputs, tuple(content["outputs"]), Interface(**call)
        refuse_odd(*found)
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise ToolchainError(
            f"what the manifest says of calling its engines cannot be read: {first_line(cause)}", help="export it again"
        ) from cause
    return found


def refuse_odd(inputs: Sequence[InputSpec], outputs: Sequence[Any], call: Interface) -> None:
    """Raise ``ValueError`` for an interface with parts of types that no export writes."""
    texts = [*outputs, *call.arguments, *call.keys, call.returns, call.module, call.original]
    texts += [text for spec in inputs for text in (spec.name, spec.dtype)]
    texts += [d.name for spec in inputs for d in spec.shape if isinstance(d, Dim)]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise ValueError("a name that is no text")
    sizes = [
        n for spec in inputs for d in spec.shape for n in ((d.low, d.typical, d.high) if isinstance(d, Dim) else (d,))
    ]
    if not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
        raise ValueError("a size that is no whole number")
    if not isinstance(call.config, Mapping):
        raise ValueError("a configuration that is no table")
    for spec in inputs:
        np.dtype(spec.dtype)
        if spec.role not in ROLES:
            raise ValueError(f"{spec.name} has a role that there is not")
        if not all(v is None or isinstance(v, int | float) for v in (spec.low, spec.high, spec.default)):
            raise ValueError(f"{spec.name} has a range that is no number")
