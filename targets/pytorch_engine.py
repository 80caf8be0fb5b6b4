"""The optimized module, run eagerly in PyTorch: shows what the passes alone do, before any engine."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.ground.reading import read_setting
from enginewright.ground.runner import CPU, Runner, Values
from enginewright.ground.signature import Arrays
from enginewright.targets.contract import Answer, Availability, Built, Graph, Target
from enginewright.targets.devices import CUDA, clock_on, has_cuda, holds_tensors, on_host, tensor_of, tensors_on

ENGINE = "engine.json"


class PyTorch(Target):
    """No weights of its own: the artifact's source and plans give the module back."""

    formats: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("int8", "fp8", "int4_weights", "int8_weights", "int4_int8", "nvfp4_weights", "mxfp8_weights"), "emulated"
    )

    runs_module: ClassVar[bool] = True

    device: Literal["cpu", "cuda"] = Field("cpu", description="where it runs")

    def availability(self) -> Availability:
        """Always on the CPU: the toolchain stands on PyTorch. Running on CUDA needs a GPU that PyTorch sees."""
        yes = Answer(True)
        runs = yes if self.device == CPU else has_cuda()
        return Availability(installed=yes, importable=yes, buildable=yes, runnable=runs)

    def build(self, graph: Graph, folder: Path) -> Built:
        """Write what the outputs are called."""
        (folder / ENGINE).write_text(json.dumps({"outputs": list(graph.outputs)}) + "\n")
        return Built()

    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module]) -> Runner:
        """Run the module that the artifact's plans give."""
        names = read_setting(folder / ENGINE, "outputs", list)
        device = CPU if self.device == "cpu" else CUDA
        return EagerRunner(module(), threads=threads, outputs=names, device=device)


class EagerRunner:
    """Calls a module with arrays or with tensors, without gradients, and answers in kind.

    Args:
        module: in eval mode.
        outputs: names for what it returns; None names tensors ``output_0`` and on, or keeps a mapping's keys.
        threads: threads of PyTorch's pool.
        dims: for each input its sizes and the names of its open dimensions, for errors.
        device: where it runs; elsewhere than on the CPU that is a copy of the module, made once.

    Raises:
        UnavailableError: the module cannot be copied to that device.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        threads: int,
        outputs: Sequence[str] | None = None,
        dims: Mapping[str, Sequence[int | str]] | None = None,
        device: str = CPU,
    ) -> None:
        self.module = module if device == CPU else copied_to(device, module)
        self.threads, self.outputs, self.dims, self.device = threads, outputs, dims or {}, device
        self.clock = clock_on(device)

    def as_timed(self, device: str = CPU) -> EagerRunner:
        """What stands for the original where time is taken: a graph is optimized then, as its users run it.

        Args:
            device: where it is timed; elsewhere than here it is a copy.

        Raises:
            UnavailableError: it cannot run there.
        """
        as_used = getattr(self.module, "as_used", None)
        if device == self.device:
            return EagerRunner(as_used(), threads=self.threads, outputs=self.outputs) if as_used else self
        if as_used:
            raise UnavailableError("it is an ONNX graph, which runs on the CPU")
        if not (found := has_cuda()).yes:
            raise UnavailableError(found.reason)
        return EagerRunner(self.module, threads=self.threads, outputs=self.outputs, dims=self.dims, device=device)

    def to_device(self, inputs: Arrays) -> Values:
        """Named arrays -> named tensors on the runner's device."""
        return dict(tensors_on(self.device, inputs))

    def __call__(self, inputs: Values) -> Values:
        """Named inputs -> named outputs."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        tensors = {name: tensor_of(value) for name, value in inputs.items()}
        if self.device != CPU:
            tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        try:
            with torch.inference_mode():
                result = self.module(**tensors)
        except (RuntimeError, ValueError, IndexError, AssertionError) as cause:
            raise self.refusal(inputs, cause) from cause
        found = flat(result)
        names = self.outputs or [f"output_{i}" for i in range(len(found))]
        if len(names) != len(found):
            raise ToolchainError(f"the model returned {len(found)} tensors; its contract names {len(names)}: {names}")
        outputs = dict(zip(names, found, strict=True))
        return dict(outputs) if holds_tensors(inputs) else dict(on_host(outputs))

    def refusal(self, inputs: Values, cause: Exception) -> ToolchainError:
        """The error for a call that the module does not take, with the dimensions by name."""
        sizes = {
            dim: size
            for name, array in inputs.items()
            for dim, size in zip(self.dims.get(name, ()), array.shape, strict=False)
            if isinstance(dim, str)
        }
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in inputs.items())
        at = ", ".join(f"{dim} = {size}" for dim, size in sizes.items())
        said = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        return ToolchainError(
            f"the model does not take {at or 'these inputs'} ({shapes}): {said}",
            help="call it with sizes that the model takes",
        )

    def first_non_finite(self, inputs: Arrays) -> str:
        """Path of the innermost module that first puts out a NaN or an infinity; empty when none does."""
        found: list[str] = []

        def look(path: str, result: Any) -> None:
            if not found and any(t.is_floating_point() and not t.isfinite().all() for t in flat(result)):
                found.append(path)

        self.watched(inputs, look)
        return found[0] if found else ""

    def first_unsteady(self, inputs: Arrays) -> str:
        """Path of the innermost module whose output first differs between two runs of one call; empty when none's."""

        def seen() -> list[tuple[str, tuple[float, ...]]]:
            found: list[tuple[str, tuple[float, ...]]] = []
            self.watched(inputs, lambda path, result: found.append((path, sums(result))))
            return found

        pairs = zip(seen(), seen(), strict=False)  # a random branch may take more layers in one of them
        return next((path for (path, one), (_, other) in pairs if not close(one, other)), "")

    def watched(self, inputs: Arrays, look: Callable[[str, Any], None]) -> None:
        """Run one call and show each module's path and output, in the order in which they end."""

        def hook_of(path: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, args, result: look(path or "the model itself", result)

        hooks = [module.register_forward_hook(hook_of(path)) for path, module in self.module.named_modules()]
        try:
            self(inputs)
        finally:
            for hook in hooks:
                hook.remove()


def copied_to(device: str, module: nn.Module) -> nn.Module:
    """A copy of a module with its parameters and buffers on another device; each is copied straight from where it lies.

    Raises:
        UnavailableError: there is no such device here, or no room on it.
    """
    memo: dict[int, Any] = {}
    try:
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for buffer in module.buffers():
            memo[id(buffer)] = buffer.detach().to(device)
    except (RuntimeError, AssertionError) as cause:  # torch asserts that it was built with CUDA
        raise UnavailableError(f"it cannot be copied to {device}: {str(cause).splitlines()[0]}") from cause
    return copy.deepcopy(module, memo)


def sums(result: Any) -> tuple[float, ...]:
    """Two numbers for each tensor of an output: far less to keep than the tensor, and hardly ever equal by chance."""
    numbers = ((torch.view_as_real(each) if each.is_complex() else each).double() for each in flat(result))
    return tuple(float(each) for values in numbers for each in (values.sum(), values.square().sum()))


def close(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two outputs are the same but for the order of additions."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(one, other, strict=True)
    )


def flat(result: Any) -> list[Tensor]:
    """The tensors of a tensor, a sequence, a mapping (a model output) or a dataclass, in order; others are left out."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for value in result.values() for tensor in flat(value)]
    if isinstance(result, tuple | list):
        return [tensor for value in result for tensor in flat(value)]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return flat([getattr(result, field.name) for field in dataclasses.fields(result)])
    return []
