"""What TensorRT and TensorRT for RTX share: both are driven through polygraphy, and build in a process of their own."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError, UnavailableError
from enginewright.ground.runner import CPU, Runner, ToDevice, Values
from enginewright.targets import machine
from enginewright.targets.contract import Answer, Availability, Built, Graph, Target
from enginewright.targets.devices import CUDA, clock_on, has_cuda, holds_tensors, on_host, tensors_on

ENGINE, LOG = "engine.plan", "build.log"


class PolygraphyTarget(Target):
    """An engine file that polygraphy builds and runs."""

    module: ClassVar[str]
    extra: ClassVar[str]
    builds_without_gpu: ClassVar[bool]

    formats: ClassVar[Mapping[str, str]] = {
        "int8": "native",
        "fp8": "native",
        "int4_weights": "native",
        "int8_weights": "emulated",
        "int4_int8": "emulated",
        "nvfp4_weights": "native",
        "mxfp8_weights": "emulated",
    }
    """As NVIDIA documents its quantized types; that each builds is tested, how an engine computes it is not."""

    build_seconds: int = Field(3600, ge=1, description="longest time that a build may take, in seconds")

    def availability(self) -> Availability:
        """Needs polygraphy and the TensorRT module; running needs a GPU, and so may building."""
        answers = [machine.installed(name, extra=self.extra) for name in ("polygraphy", self.module)]
        found = next((answer for answer in answers if not answer.yes), Answer(True))
        imports = machine.importable(self.module) if found.yes else Answer(False, "not installed")
        gpu = machine.gpu() if imports.yes else imports
        return Availability(
            installed=found,
            importable=imports,
            buildable=imports if self.builds_without_gpu else gpu,
            runnable=gpu,
        )

    def build(self, graph: Graph, folder: Path) -> Built:
        """Build ``engine.plan`` in another process and keep its log beside it."""
        request = self.request(graph, folder)
        worker = Path(__file__).with_name("tensorrt_worker.py")
        try:
            run = subprocess.run(
                [sys.executable, "-P", str(worker)],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=self.build_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as cause:
            raise ToolchainError(
                f"the build took longer than {self.build_seconds} s", help=f"raise {self.name()}:build_seconds"
            ) from cause
        lines = (run.stderr + run.stdout).replace(str(graph.path.parent), ".").splitlines()
        answer: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"ok": False}
        log = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines[:-1] if "'colored'" not in line]
        if not answer["ok"]:
            raise ToolchainError(
                refusal(log, answer.get("reason", f"the builder died with exit code {run.returncode}"))
            )
        (folder / LOG).write_text("\n".join(log) + "\n")
        sparse = ("built with sparse weights: layers of the 2:4 pattern may run sparse",) if request["sparse"] else ()
        return Built(notes=(*sparse, *(line for line in log if line.startswith("[W]"))))

    def request(self, graph: Graph, folder: Path) -> dict[str, Any]:
        """What the worker is asked for; sparse weights where a pass made some layer so."""
        return {
            "rtx": self.module == "tensorrt_rtx",
            "onnx": str(graph.path),
            "engine": str(folder / ENGINE),
            "ranges": graph.ranges,
            "sparse": any(hint.pattern == "2:4" for hint in graph.hints.values()),
        }

    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module]) -> Runner:
        """Ready the engine on the GPU."""
        del threads, module
        return EngineRunner(open_engine(folder / ENGINE, rtx=self.module == "tensorrt_rtx"))


def refusal(log: list[str], reason: str) -> str:
    """The builder's reason: the operators that it refused, and of the first one its node and why."""
    refused = sorted({match[1] for line in log if (match := re.search(r"operator: (\w+)", line))})
    if refused:
        return f"the parser refuses these operators: {', '.join(refused)}{first_node(log)}"
    errors = [line.removeprefix("[E] ") for line in log if line.startswith("[E]")]
    return f"{reason}; {errors[0]}" if errors else reason


NODE = re.compile(r"with name: (\S*) and operator: \w+ \([^)]*\): (?:\w+: )?(?:Assertion failed: [^:]*: )?(.+)")
"""What the parser says of a node: its name, and what is wrong with it."""

ADVICE = {"zero point": "quantize symmetrically, with zero points of 0 (int8), as quantize_int8 does"}
"""By words of the parser's reason, what helps."""


def first_node(log: list[str]) -> str:
    """The first node that the parser says something about, what it says, and what helps; empty without one."""
    found = next((match for line in log if (match := NODE.search(line))), None)
    if found is None:
        return ""
    reason = found[2].partition(". ")[0].rstrip(".")
    tips = [tip for words, tip in ADVICE.items() if words in reason.lower()]
    return f"; node {found[1]!r}: {'; '.join([reason, *tips])}"


def open_engine(path: Path, *, rtx: bool) -> Any:
    """An engine in polygraphy, ready; needs a GPU."""
    wanted = "1" if rtx else "0"
    if "polygraphy" in sys.modules and os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX", "0") != wanted:
        raise UnavailableError(
            "polygraphy serves only one of TensorRT and TensorRT for RTX in a process",
            help="bench the two in two runs",
        )
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = wanted
    backend: Any = importlib.import_module("polygraphy.backend.trt")
    runner = backend.TrtRunner(backend.EngineFromBytes(path.read_bytes()))
    runner.activate()
    return runner


class EngineRunner:
    """Runs an engine through polygraphy on named arrays, or on named tensors of its device, and answers in kind.

    Args:
        runner: polygraphy's, active. It waits for its own stream, so a call returns when its work is done.
    """

    device = CUDA

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.tensors = (
            has_cuda().yes
        )  # one kind for good: polygraphy's buffers for outputs are of the first call's kind
        self.clock = clock_on(CUDA if self.tensors else CPU)
        engine = runner.engine
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self.shapes = {name for name in names if engine.is_shape_inference_io(name)}

    @property
    def to_device(self) -> ToDevice | None:
        """Named arrays -> named tensors there; None where PyTorch has no CUDA."""
        return (lambda inputs: dict(self.given(inputs))) if self.tensors else None

    def given(self, inputs: Values) -> dict[str, Tensor]:
        """Inputs as the engine takes them: tensors on the device, but shapes on the host, where it reads them."""
        here = {name: value for name, value in inputs.items() if name in self.shapes}
        there = {name: value for name, value in inputs.items() if name not in self.shapes}
        return {**tensors_on(CPU, here), **tensors_on(CUDA, there)}

    def __call__(self, inputs: Values) -> Values:
        """Named inputs -> named outputs."""
        if not self.tensors:
            return {name: array.copy() for name, array in self.runner.infer(inputs).items()}
        found = self.runner.infer(self.given(inputs), copy_outputs_to_host=False)
        outputs = {name: tensor.clone() for name, tensor in found.items()}  # its own are written anew by the next call
        return dict(outputs) if holds_tensors(inputs) else dict(on_host(outputs))
