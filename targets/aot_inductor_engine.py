"""AOTInductor: PyTorch's own compiler, ahead of time; C++ for this processor in one package that PyTorch loads.

It compiles the exported program and not the ONNX graph, so what a pass computes in wider numbers stays so. A package is
native code: loading one runs it, so an artifact's own is loaded only where the user trusts the artifact.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from enginewright.ground.errors import ToolchainError, UnavailableError, raise_faults
from enginewright.ground.reading import read_setting
from enginewright.ground.runner import Runner, Values
from enginewright.targets import machine
from enginewright.targets.contract import Answer, Availability, Built, Graph, Target
from enginewright.targets.devices import holds_tensors, on_host, tensor_of
from enginewright.targets.onnx_export import quiet_exporter

PACKAGE, SIGNATURE = "engine.pt2", "signature.json"

SOURCES = (".cpp", ".h")
"""Files of a package that only its maker reads; they say where on its machine everything lay."""

INSTRUCTIONS = (
    "abm",
    "adx",
    "aes",
    "amx",
    "avx",
    "bmi",
    "f16c",
    "fma",
    "gfni",
    "movbe",
    "popcnt",
    "sha",
    "sse",
    "ssse",
)
"""How flags of a processor begin that a compiler may make use of."""


class AotInductor(Target):
    """A compiled package for the CPU that it was built on; it needs PyTorch to run, of the same version."""

    formats: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("int8", "fp8", "int4_weights", "int8_weights", "int4_int8", "nvfp4_weights", "mxfp8_weights"), "emulated"
    )

    runs_code: ClassVar[bool] = True

    def availability(self) -> Availability:
        """Needs a C++ compiler to build, and none to run."""
        yes = Answer(True)
        builds = compiler()
        return Availability(installed=yes, importable=yes, buildable=builds, runnable=yes)

    def build(self, graph: Graph, folder: Path) -> Built:
        """Compile the exported program into ``engine.pt2``, and write what it takes and gives."""
        if graph.program is None:
            raise ToolchainError(
                "AOTInductor compiles an exported program, and there is none of this network",
                help="it is an ONNX graph, or one that hoist_constants parts in two: leave that out, or this target",
            )
        program = graph.program()
        graph.say("compiling C++")
        compile_package(program, folder / PACKAGE)
        version = public(torch.__version__)
        written = {
            "torch": version,
            "instructions": instructions(),
            "inputs": inputs_of(program, graph),
            "outputs": [value.name for value in onnx.load(graph.path, load_external_data=False).graph.output],
        }
        (folder / SIGNATURE).write_text(json.dumps(written, indent=2) + "\n")
        return Built(
            notes=(f"compiled for PyTorch {version} and for what this processor can do: it runs nowhere else",)
        )

    def load(self, folder: Path, *, threads: int, module: Callable[[], nn.Module]) -> Runner:
        """Load the package, which runs code of it.

        Raises:
            UnavailableError: it was compiled for another PyTorch, or for a processor that can do more.
        """
        del module
        from torch._inductor import aoti_load_package

        kinds = {"torch": str, "instructions": list, "inputs": dict, "outputs": list}
        said = {key: read_setting(folder / SIGNATURE, key, kind) for key, kind in kinds.items()}
        refuse_other(said["torch"], said["instructions"])
        with quiet_exporter():
            package = aoti_load_package(str(folder / PACKAGE))
        return PackageRunner(package, said["inputs"], said["outputs"], threads=threads)


def compiler() -> Answer:
    """Whether the C++ compiler that PyTorch would call is there."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return Answer(True) if shutil.which(name) else Answer(False, f"no C++ compiler {name!r}; install it, or set CXX")


def compile_package(program: ExportedProgram, path: Path) -> None:
    """Write a package whose threads are those of PyTorch when it runs, and which keeps no source.

    Raises:
        ToolchainError: PyTorch cannot lower the program, or the compiler fails.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache

    draft = path.with_suffix(".draft.pt2")
    try:
        with quiet_exporter(), fresh_cache():
            aoti_compile_and_package(program, package_path=str(draft), inductor_configs={"cpp.dynamic_threads": True})
    except Exception as cause:  # the compiler's errors, the lowering's and those of what they call have no common base
        said = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ToolchainError(f"AOTInductor cannot compile it: {said}") from cause
    with zipfile.ZipFile(draft) as made, zipfile.ZipFile(path, "w") as kept:
        for entry in made.infolist():
            if not entry.filename.endswith(SOURCES):
                with made.open(entry) as file, kept.open(entry, "w") as copy:
                    shutil.copyfileobj(file, copy)
    draft.unlink()


def public(version: str) -> str:
    """A version without what says how it was built, such as ``+cpu``."""
    return version.partition("+")[0]


def instructions() -> list[str]:
    """What this processor can do that a compiler may make use of; empty where the system does not say."""
    return sorted(flag for flag in machine.cpu_flags() if flag.startswith(INSTRUCTIONS))


def refuse_other(made: str, needed: Sequence[str]) -> None:
    """Raise where a package could crash: made with another PyTorch, or for a processor that can do more than this."""
    help_ = "export the model again on a machine like this one"
    if made != (here := public(torch.__version__)):
        raise UnavailableError(f"it was compiled for PyTorch {made}; this is {here}", help=help_)
    if lacking := sorted(set(map(str, needed)) - set(instructions())):
        raise UnavailableError(f"it was compiled for a processor that has {', '.join(lacking)}", help=help_)


def inputs_of(program: ExportedProgram, graph: Graph) -> dict[str, dict[str, Any]]:
    """For each input its type and its sizes: a number, or the symbol of a dimension with the sizes that it may have."""
    values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    found = {}
    for name in map(str, program.graph_signature.user_inputs):
        low, _, high = graph.ranges[name]
        sizes = [
            size if isinstance(size, int) else [str(size), low[axis], high[axis]]
            for axis, size in enumerate(values[name].shape)
        ]
        found[name] = {"dtype": str(values[name].dtype).removeprefix("torch."), "shape": sizes}
    return found


class PackageRunner:
    """Calls a compiled package with named arrays or tensors, and answers in kind.

    Compiled code looks at nothing that it is given, so another type, and a size out of its range, is found here.

    Args:
        package: loaded.
        inputs: as ``inputs_of`` gives them.
        outputs: their names.
        threads: of PyTorch's pool, which the package uses.
    """

    def __init__(
        self, package: Callable[..., Any], inputs: Mapping[str, Any], outputs: Sequence[str], *, threads: int
    ) -> None:
        self.package, self.inputs, self.outputs, self.threads = package, inputs, list(outputs), threads

    def __call__(self, inputs: Values) -> Values:
        """Named inputs -> named outputs.

        Raises:
            ToolchainError: an input is missing, or of a type or size that the package was not compiled for.
        """
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        tensors = {name: tensor_of(inputs[name]).contiguous() for name in self.inputs if name in inputs}
        raise_faults(self.faults(tensors))
        with torch.inference_mode():
            found = self.package(**tensors)
        values: Sequence[Tensor] = [found] if isinstance(found, Tensor) else found
        outputs = dict(zip(self.outputs, values, strict=True))
        return dict(outputs) if holds_tensors(inputs) else dict(on_host(outputs))

    def faults(self, given: Mapping[str, Tensor]) -> list[ToolchainError]:
        """What the package would read wrongly: it takes an address for what it was compiled for."""
        found: list[str] = []
        known: dict[str, int] = {}
        for name, wanted in self.inputs.items():
            if name not in given:
                found.append(f"input {name!r} is missing")
                continue
            tensor, sizes = given[name], wanted["shape"]
            if (dtype := str(tensor.dtype).removeprefix("torch.")) != wanted["dtype"]:
                found.append(f"input {name!r} is {dtype}; it was compiled for {wanted['dtype']}")
            fits = len(sizes) == tensor.ndim and all(
                size == asked
                if isinstance(asked, int)
                else asked[1] <= size <= asked[2] and known.setdefault(asked[0], size) == size
                for size, asked in zip(tensor.shape, sizes, strict=True)
            )
            if not fits:
                said = ", ".join(str(each) if isinstance(each, int) else f"{each[1]} to {each[2]}" for each in sizes)
                found.append(f"input {name!r} has shape {tuple(tensor.shape)}; it was compiled for ({said})")
        return [ToolchainError(text, help="call it with sizes that the model takes") for text in found]
