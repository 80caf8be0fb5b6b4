"""What a source gives: a module with its input contract, and what is known about it."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from toolchain.errors import ToolchainError
from toolchain.reading import first_line
from validation.contract import SamplingTask
from validation.inputs import Arrays, Dim, InputSpec, draw

LIBRARIES = ("diffusers", "transformers")
"""Whose classes an interface may name: an engine builds no others."""


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
class Model:
    """A network ready for the pipeline.

    Args:
        name: the string that asked for it, such as ``dit:digits``.
        module: in eval mode; ``forward`` takes the inputs by name.
        inputs: its input contract.
        outputs: names of what it returns, in order.
        weights: where the weights came from, in words.
        published: figures from its paper.
        task: for generative models, a whole sampling run with a judge.
        realistic: (count, seed) -> inputs like those in use; None where random ones must do.
        interface: how the original is called; None: by input names, giving a tensor or a tuple.
        tokenize: from sentences to one call, for encoders of text that come with a tokenizer.
        carried: files that go into the artifact beside the engine, such as a tokenizer's.
        files: what it was read from, by path relative to the file or folder that was named: weights, configuration,
            code. Empty where nothing was named.
    """

    name: str
    module: nn.Module
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    weights: str
    published: tuple[Published, ...] = ()
    task: SamplingTask | None = None
    realistic: Callable[[int, int], list[Arrays]] | None = None
    interface: Interface | None = None
    tokenize: Callable[[Sequence[str]], Arrays] | None = None
    carried: tuple[Path, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)

    def batches(self, count: int, seed: int) -> list[Arrays]:
        """``count`` sets of inputs at typical sizes: realistic where the model can make them, else random."""
        if self.realistic:
            return self.realistic(count, seed)
        return [draw(self.inputs, seed=seed + i) for i in range(count)]


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
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        result = module(**inputs)
    arguments = tuple(name for name in inspect.signature(module.forward).parameters if name not in ("args", "kwargs"))
    library = type(module).__module__.partition(".")[0]
    original = f"{library}:{type(module).__name__}" if library in LIBRARIES else ""
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
    inputs = [
        {**vars(spec), "shape": [vars(d) if isinstance(d, Dim) else d for d in spec.shape]} for spec in model.inputs
    ]
    content = {"inputs": inputs, "outputs": model.outputs, "call": vars(model.interface or plain)}
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
        inputs = tuple(
            InputSpec(**{**entry, "shape": tuple(Dim(**d) if isinstance(d, dict) else d for d in entry["shape"])})
            for entry in content["inputs"]
        )
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
        if not all(v is None or isinstance(v, int | float) for v in (spec.low, spec.high, spec.default)):
            raise ValueError(f"{spec.name} has a range that is no number")
