"""The optimized module, run eagerly in PyTorch: shows what the passes alone do, before any engine."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import read_setting
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays
from enginewright.targets.contract import Answer, Availability, Built, Graph, Target

ENGINE = "engine.json"


class PyTorch(Target):
    """No weights of its own: the artifact's source and plans give the module back."""

    formats: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("int8", "fp8", "int4_weights", "int8_weights", "int4_int8", "nvfp4_weights", "mxfp8_weights"), "emulated"
    )

    runs_module: ClassVar[bool] = True

    def availability(self) -> Availability:
        """Always: the toolchain stands on PyTorch."""
        yes = Answer(True)
        return Availability(installed=yes, importable=yes, buildable=yes, runnable=yes)

    def build(self, graph: Graph, folder: Path) -> Built:
        """Write what the outputs are called."""
        (folder / ENGINE).write_text(json.dumps({"outputs": list(graph.outputs)}) + "\n")
        return Built()

    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module]) -> Runner:
        """Run the module that the artifact's plans give."""
        names = read_setting(folder / ENGINE, "outputs", list)
        return EagerRunner(module(), threads=threads, outputs=names)


class EagerRunner:
    """Calls a module with arrays, without gradients.

    Args:
        module: in eval mode.
        outputs: names for what it returns; None names tensors ``output_0`` and on, or keeps a mapping's keys.
        threads: threads of PyTorch's pool.
        dims: for each input its sizes and the names of its open dimensions, for errors.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        threads: int,
        outputs: Sequence[str] | None = None,
        dims: Mapping[str, Sequence[int | str]] | None = None,
    ) -> None:
        self.module, self.threads, self.outputs, self.dims = module, threads, outputs, dims or {}

    def as_timed(self) -> EagerRunner:
        """What stands for the original where time is taken: a graph is optimized then, as its users run it."""
        as_used = getattr(self.module, "as_used", None)
        return EagerRunner(as_used(), threads=self.threads, outputs=self.outputs) if as_used else self

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        try:
            with torch.inference_mode():
                result = self.module(**tensors)
        except (RuntimeError, ValueError, IndexError, AssertionError) as cause:
            raise self.refusal(inputs, cause) from cause
        found = [tensor.numpy() for tensor in flat(result)]
        names = self.outputs or [f"output_{i}" for i in range(len(found))]
        if len(names) != len(found):
            raise ToolchainError(f"the model returned {len(found)} tensors; its contract names {len(names)}: {names}")
        return dict(zip(names, found, strict=True))

    def refusal(self, inputs: Arrays, cause: Exception) -> ToolchainError:
        """The error for a call that the module does not take, with the dimensions by name."""
        sizes = {
            dim: size
            for name, array in inputs.items()
            for dim, size in zip(self.dims.get(name, ()), array.shape, strict=False)
            if isinstance(dim, str)
        }
        shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
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
