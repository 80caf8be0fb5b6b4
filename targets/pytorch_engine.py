"""The optimized module, run eagerly in PyTorch: shows what the passes alone do, before any engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from targets.contract import Answer, Arrays, Availability, Built, Graph, Runner, Target
from targets.onnx_files import check_onnx
from toolchain.errors import ToolchainError
from toolchain.reading import read_setting

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
        names = [output.name for output in check_onnx(graph.path).graph.output]
        (folder / ENGINE).write_text(json.dumps({"outputs": names}) + "\n")
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
    """

    def __init__(self, module: nn.Module, *, threads: int, outputs: Sequence[str] | None = None) -> None:
        self.module, self.threads, self.outputs = module, threads, outputs

    def as_timed(self) -> EagerRunner:
        """What stands for the original where time is taken: a graph is optimized then, as its users run it."""
        as_used = getattr(self.module, "as_used", None)
        return EagerRunner(as_used(), threads=self.threads, outputs=self.outputs) if as_used else self

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named inputs -> named outputs."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            result = self.module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        found = [tensor.numpy() for tensor in flat(result)]
        names = self.outputs or [f"output_{i}" for i in range(len(found))]
        if len(names) != len(found):
            raise ToolchainError(f"the model returned {len(found)} tensors; its contract names {len(names)}: {names}")
        return dict(zip(names, found, strict=True))

    def first_non_finite(self, inputs: Arrays) -> str:
        """Path of the innermost module that first puts out a NaN or an infinity; empty when none does."""
        found: list[str] = []

        def look(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, result: Any) -> None:
                del module, args
                if not found and any(t.is_floating_point() and not t.isfinite().all() for t in flat(result)):
                    found.append(path or "the model itself")

            return hook

        hooks = [module.register_forward_hook(look(path)) for path, module in self.module.named_modules()]
        try:
            self(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else ""


def flat(result: Any) -> list[Tensor]:
    """The tensors of a tensor, a sequence or a mapping (a model output), in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for value in result.values() for tensor in flat(value)]
    if isinstance(result, tuple | list):
        return [tensor for value in result for tensor in flat(value)]
    return []
