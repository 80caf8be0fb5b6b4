"""An artifact's engine in the place of the module that it was made from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.ground.runner import CPU, Runner, Values, device_of, inputs_for, to_device_of
from enginewright.ground.signature import Dim, InputSpec
from enginewright.opened import engines_of, reopen, replay
from enginewright.passes.networks import Networks
from enginewright.pipeline import Run
from enginewright.recipe import threads_here
from enginewright.sources.contract import LIBRARIES, Interface, read_interface
from enginewright.sources.filling import without_memory
from enginewright.targets import stored
from enginewright.targets.devices import tensor_of
from enginewright.trust import engine_untrusted

ABSENT = {"attention_mask": 1, "token_type_ids": 0}
"""What an input is when a caller leaves it out, as transformers has it."""


class Engine:
    """Called like the module that it stands in for, with tensors or with arrays, and answers in kind.

    Tensors that lie on an accelerator stay there where the engine takes them so, and are copied where not; the answer
    lies where the first tensor did.

    Attributes that the module has and an engine lacks (``config``, methods that pipelines call) come from a copy of the
    module without weights.
    """

    def __init__(
        self, runner: Runner, inputs: tuple[InputSpec, ...], outputs: tuple[str, ...], interface: Interface
    ) -> None:
        self.runner, self.inputs, self.outputs, self.interface = runner, inputs, outputs, interface
        self.dtype = torch.float32
        self.device = torch.device(device_of(runner) if to_device_of(runner) else CPU)
        self._skeleton: nn.Module | None = None

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run the engine.

        Raises:
            ToolchainError: an input is missing, unknown, or of another shape than the engine takes.
        """
        given = self.named(args, kwargs)
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        found = self.runner(self.taken(given))
        values = [tensor_of(found[name]).to(tensors[0].device) if tensors else found[name] for name in self.outputs]
        return self.answer(values, return_dict=return_dict)

    forward = __call__

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by name; mappings and sequences are spread, options that are off or always on are dropped."""
        arguments = self.interface.arguments
        if len(args) > len(arguments):
            raise ToolchainError(f"{len(args)} positional arguments were given; the module takes {len(arguments)}")
        given = {**dict(zip(arguments, args, strict=False)), **kwargs}
        for name, value in list(given.items()):
            if isinstance(value, Mapping):
                given |= given.pop(name)
            elif isinstance(value, tuple | list):
                del given[name]
                given |= {f"{name}_{i}": part for i, part in enumerate(value)}
        wanted = {spec.name for spec in self.inputs}
        for name, value in list(given.items()):
            if name not in wanted:
                if isinstance(value, Tensor | np.ndarray):
                    raise ToolchainError(
                        f"the engine has no input {name!r}; it was exported with {', '.join(sorted(wanted))}"
                    )
                returned = name.removeprefix("output_") in self.interface.keys  # it comes in any case
                idle = isinstance(value, torch.Generator)  # no engine draws: a model that does is not exported
                if value not in (None, False) and not returned and not idle:
                    raise ToolchainError(f"the engine cannot be called with {name}={value!r}: it was exported without")
                del given[name]
        return {name: value for name, value in given.items() if value is not None}

    def taken(self, given: Mapping[str, Any]) -> Values:
        """What the runner takes: every input, of its type and rank; all on its device where one came on a device."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            shape = np.shape(given[spec.name]) if spec.name in given else ()
            if len(shape) == len(spec.shape):
                sizes = {d.name: n for d, n in zip(spec.shape, shape, strict=True) if isinstance(d, Dim)} | sizes
        values = {spec.name: self.one(spec, given, sizes) for spec in self.inputs}
        there = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if not there:
            return values
        return {**inputs_for(self.runner, {k: v for k, v in values.items() if k not in there}), **there}

    def one(self, spec: InputSpec, given: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        """One input as an array, or as a tensor where it stays on the device; a single number stands for every row."""
        if spec.name not in given:
            default = ABSENT.get(spec.name) if spec.default is None else spec.default
            if default is None:
                raise ToolchainError(f"input {spec.name!r} is missing")
            return np.full(spec.sizes(sizes), default, spec.dtype)
        value = given[spec.name]
        wanted = spec.sizes(sizes)
        array: Any
        if isinstance(value, Tensor) and value.device.type != CPU and self.device.type != CPU:
            array = value.detach()
        else:
            array = np.asarray(widened(value.cpu() if isinstance(value, Tensor) else value))
        if array.ndim == 0:
            array = array.expand(wanted) if isinstance(array, Tensor) else np.broadcast_to(array, wanted)
        if tuple(array.shape) != wanted:
            shape = ", ".join(
                str(d) if isinstance(d, int) else f"{d.name} = {sizes[d.name]}" if d.name in sizes else d.name
                for d in spec.shape
            )
            raise ToolchainError(f"input {spec.name!r} has shape {tuple(array.shape)}; the engine takes ({shape})")
        for d in spec.shape:
            if isinstance(d, Dim) and sizes[d.name] % d.multiple_of:
                raise ToolchainError(f"input {spec.name!r} has shape {tuple(array.shape)}; {d.fault_of(sizes[d.name])}")
        if isinstance(array, Tensor):
            return array.to(self.device, getattr(torch, spec.dtype)).contiguous()
        return np.ascontiguousarray(array, spec.dtype)

    def answer(self, values: list[Any], *, return_dict: bool) -> Any:
        """Values in the form that the module returns them in."""
        if self.interface.returns == "tensor":
            return values[0]
        if self.interface.returns == "tuple" or not return_dict:
            return tuple(values)
        if self.interface.returns == "dict":
            return dict(zip(self.interface.keys, values, strict=True))
        module, _, name = self.interface.returns.partition(":")
        if module.partition(".")[0] not in LIBRARIES:
            raise ToolchainError(f"the artifact names {self.interface.returns!r} for its outputs; refused")
        cls = getattr(importlib.import_module(module), name, None)
        if not (isinstance(cls, type) and issubclass(cls, Mapping)):
            raise ToolchainError(f"the artifact names {self.interface.returns!r} for its outputs; refused")
        return cls(**dict(zip(self.interface.keys, values, strict=True)))

    def __getattr__(self, name: str) -> Any:
        """What the module itself would say, from a copy without weights."""
        if name.startswith("__"):
            raise AttributeError(name)
        if self._skeleton is None:
            self._skeleton = skeleton(self.interface)
        return getattr(self._skeleton, name)


def widened(value: Any) -> Any:
    """A value as it is, or in float32 where numpy lacks its type."""
    return value.detach().float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def skeleton(interface: Interface) -> nn.Module:
    """The module of an interface, built from its configuration, without weights.

    Raises:
        AttributeError: the interface names no class of a known library.
    """
    library, _, name = interface.original.partition(":")
    if library not in LIBRARIES:
        raise AttributeError("the engine is no module; it has no other attributes than those of an engine")
    found = getattr(importlib.import_module(library), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise AttributeError(f"the artifact names {interface.original!r} for its module; refused")
    cls: Any = found
    with without_memory():
        if library == "diffusers":
            built: nn.Module = cls.from_config(dict(interface.config))
        else:
            built = cls(cls.config_class(**interface.config))
    return built


def load(
    folder: str | Path, target: str | None = None, *, threads: int | None = None, trust_code: bool = False
) -> Engine:
    """Ready an artifact's engine, to be called like the module that it was made from.

    Args:
        folder: what ``enginewright export`` wrote.
        target: which engine; by default the first that runs here.
        threads: CPU threads; by default every core allowed.
        trust_code: run the Python code that the model is made by, which only the target ``pytorch`` needs, and native
            code that the artifact brings, which the target ``aot_inductor`` is.

    Raises:
        ToolchainError: damaged, or no engine of it runs here, or that would run code which is not trusted.
    """
    folder = Path(folder)
    run = reopen(folder, trust_code=trust_code)
    return Engine(first_engine(run, folder, target, threads or threads_here()), *read_interface(run.manifest))


def first_engine(run: Run, folder: Path, target: str | None, threads: int) -> Runner:
    """The engine asked for, or the first that runs here."""
    doubted = [engine_untrusted(step, trusted=run.trust_code) for step in run.recipe.targets if not target]
    reasons = [f"{error.message} ({error.help})" for error in doubted if error]
    trusted = [step.name for step in run.recipe.targets if not engine_untrusted(step, trusted=run.trust_code)]
    for name in [target] if target else trusted:
        try:
            return engines_of(run, folder, name, threads)[0][name]
        except UnavailableError as cause:
            reasons.append(cause.message)
    raise UnavailableError("; ".join(reasons) or f"{str(folder)!r} was exported without targets")


def load_module(folder: str | Path, *, source: str | Path | None = None, trust_code: bool = False) -> nn.Module:
    """An artifact's optimized PyTorch module, for further training: source, recorded plans, weights of its own.

    Several networks by timestep come together, in a module that takes the artifact's own inputs by name.

    Args:
        folder: what ``enginewright export`` wrote.
        source: the file or folder that it was made from, if that was moved.
        trust_code: run the Python code that the model is made by: a ``py:`` file, or what a checkpoint brings along.

    Raises:
        ToolchainError: the artifact is damaged, or its source is not where it was, or not what it was, or is code
            which is not trusted.
    """
    folder = Path(folder)
    run = reopen(folder, (Path(source) if source is not None else None,), trust_code=trust_code)
    module = replay(run, folder)
    for parameter in (*module.parameters(), *module.buffers()):
        if stored.place_of(parameter):
            parameter.data = parameter.data.clone()  # a mapped file is read-only
    if run.model.interface is None or isinstance(module, Networks):
        return module
    return module.get_submodule(run.model.interface.module)
