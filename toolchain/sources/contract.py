"""What a source gives: a module with its input contract, and what is known about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from validation.contract import SamplingTask
from validation.inputs import Arrays, InputSpec, draw


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
        returns: ``tensor``, ``tuple``, or the class of a model output, ``module:Class``, of diffusers or transformers.
        keys: fields of that class, as many as there are outputs.
        module: path of the module that is replaced, inside the one that is exported; empty for that one itself.
        config: what the module's ``config`` says, for pipelines that look there.
    """

    arguments: tuple[str, ...]
    returns: str = "tensor"
    keys: tuple[str, ...] = ()
    module: str = ""
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
        carried: files that go into the artifact beside the engine, such as a tokenizer's.
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
    carried: tuple[Path, ...] = ()

    def batches(self, count: int, seed: int) -> list[Arrays]:
        """``count`` sets of inputs at typical sizes: realistic where the model can make them, else random."""
        if self.realistic:
            return self.realistic(count, seed)
        return [draw(self.inputs, seed=seed + i) for i in range(count)]


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
    returns = "tensor"
    keys: tuple[str, ...] = ("output",)
    if isinstance(result, tuple | list):
        returns, keys = "tuple", tuple(f"output_{i}" for i, _ in enumerate(result))
    elif isinstance(result, Mapping):
        returns = f"{type(result).__module__}:{type(result).__qualname__}"
        keys = tuple(key for key, value in result.items() if isinstance(value, Tensor))
    return Interface(arguments=arguments, returns=returns, keys=keys, module=path, config=config or {}), keys
