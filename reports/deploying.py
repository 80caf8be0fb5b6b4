"""An artifact's own README: which files to copy for each engine, and how to run them with nothing of ours installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from shlex import quote

from enginewright.ground.program import SOLE, Program, StateTensor
from enginewright.reports import words
from enginewright.reports.record import Report, TargetRecord


@dataclass(frozen=True, kw_only=True)
class Value:
    """An input or output of an engine.

    Args:
        name: as the engine has it.
        dtype: numpy's name of the element type.
        shape: sizes to call it with; of an output empty.
        said: the shape in words, with the ranges of its dynamic sizes.
        fill: a value that every element may have.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    said: str = ""
    fill: int = 1


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine of a target.

    Args:
        kind: what runs it.
        folder: where its copy lies, in the folder that it is copied to.
        file: the graph or the built engine, in that folder.
        files: what is copied there, by path in the artifact, with bytes.
        inputs: what it is called with.
        outputs: what it gives.
        provider: of ONNX Runtime.
        disabled: optimizers of ONNX Runtime that would make a graph that it refuses itself.
        plain: whether ONNX Runtime must optimize nothing at all.
        options: of the session.
        passed: inputs that engines before it give.
    """

    kind: str
    folder: str
    file: str = ""
    files: Mapping[str, int] = field(default_factory=dict)
    inputs: Sequence[Value] = ()
    outputs: Sequence[Value] = ()
    provider: str = "CPUExecutionProvider"
    disabled: Sequence[str] = ()
    plain: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    passed: Sequence[str] = ()


def render(report: Report, engines: Mapping[str, Sequence[Engine]], program: Program = SOLE) -> str:
    """The README as Markdown.

    Args:
        report: of the artifact.
        engines: those of each target that was built, by its name.
        program: how they work together.
    """
    built = [target for target in report.targets if engines.get(target.name)]
    parts = [
        f"# {report.model.name}: how to use this folder",
        "enginewright made it. `report.html` says what was done and measured, `recipe.toml` how to do it again, and "
        "`manifest.json` holds a digest of every file. To run an engine elsewhere, copy what its section lists; "
        "nothing else of this folder is needed, and nothing of enginewright.",
        *(section(target, engines[target.name], program) for target in built),
        *([] if built else ["No engine was built; `model.onnx` with the files beside it is the graph."]),
        with_us(),
    ]
    return "\n\n".join(parts) + "\n"


def render_pipeline(report: Report) -> str:
    """The README of a pipeline's artifact as Markdown: its parts, and how all of them run together."""
    rows = [f"| [`{part.name}`]({part.name}/README.md) | {words.size(part.model.bytes)} |" for part in report.parts]
    parts = [
        f"# {report.model.name}: how to use this folder",
        "enginewright made it. `report.html` says what was done and measured, `recipe.toml` how to do it again, and "
        "`manifest.json` holds a digest of every file. Each network has a folder of its own, whose README says what to "
        "copy and how to run it with nothing of enginewright:",
        "\n".join(["| Network | Weights of the original |", "| --- | ---: |", *rows]),
        "## With enginewright installed",
        code(
            [
                "import enginewright",
                "",
                'pipe = enginewright.load_pipeline("THIS FOLDER")  # the original pipeline, run by the engines',
                f'network = enginewright.load("THIS FOLDER/{report.parts[0].name}")  # one of them alone',
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def section(target: TargetRecord, engines: Sequence[Engine], program: Program) -> str:
    """One target: its files, its inputs and outputs, and code that runs it."""
    kinds = {engine.kind for engine in engines}
    if "module" in kinds:
        return (
            f"## {target.name}\n\nThe optimized module itself: it needs enginewright and the model's source; see below."
        )
    lines = [f"## {target.name}", f"Copy {words.size(target.bytes)}:"]
    lines.append("\n".join(["```sh", *copying(engines), "```"]))
    rows = [f"| `{path}` | {size:,} |" for engine in engines for path, size in engine.files.items()]
    lines.append("\n".join(["| File | Bytes |", "| --- | ---: |", *dict.fromkeys(rows)]))
    if len(engines) > 1:
        lines.append(several(program))
    if program.start:
        lines.append(kept(program))
    if "onnxruntime" in kinds:
        lines += ["Then, in `DEST`, with `pip install onnxruntime numpy`:", code(onnx_code(engines))]
    elif "python" in kinds:
        lines += ["Then, in `DEST`, with Python alone, for one row:", code(program_code(engines[0]))]
    elif "aot_inductor" in kinds:
        lines += [
            "Then, in `DEST`, with the same version of PyTorch, on a processor like the one that it was built on (the "
            "package is native code, and PyTorch checks neither):",
            code(["import torch", "", *(line for engine in engines for line in package_code(engine))]),
        ]
    else:
        lines += [
            f"Then, in `DEST`, on a GPU like the one that it was built for, with {engines[0].kind} and PyTorch:",
            code([line for engine in engines for line in tensorrt_code(engine)]),
        ]
    return "\n\n".join(lines)


def copying(engines: Sequence[Engine]) -> list[str]:
    """Shell lines that copy what is needed to ``DEST``."""
    whole = [f"engines/{engine.folder}" for engine in engines if lies_inside(engine)]
    lines = [f"mkdir -p DEST && cp -r {' '.join(whole)} DEST/"] if whole else []
    places: dict[str, dict[str, None]] = {}
    for engine in engines:
        for path in () if lies_inside(engine) else engine.files:
            places.setdefault(str((PurePosixPath(engine.folder) / path).parent), {})[quote(path)] = None
    return lines + [f"mkdir -p DEST/{place} && cp {' '.join(files)} DEST/{place}/" for place, files in places.items()]


def lies_inside(engine: Engine) -> bool:
    """Whether all that an engine needs is in its own folder."""
    return all(PurePosixPath(path).parts[:2] == ("engines", engine.folder) for path in engine.files)


def several(program: Program) -> str:
    """How several engines of a target work together."""
    once = any(call.once for way in program.ways for call in way.calls)
    if program.table is None and program.inner:
        return "The engines run one after the other, in this order: each gives what those after it take."
    if program.table is None:
        return "Two engines: the first runs once for a sampling run, the second at each step, with what the first gave."
    return (
        "Several engines for the steps of a sampler: in `program.json` of this folder the table holds the schedule "
        "(`timesteps`) and, for each of its entries, the way that a call goes through the networks (`ways`)."
        + (" Those called prepare run once for a sampling run, and pass what they give to the step after them." * once)
    )


def kept(program: Program) -> str:
    """How state tensors go from one call to the next, where a call continues a sequence."""
    names = words.listing([into(state, program.start) for state in program.states])
    first = words.listing([f"`{state.name}` {state.shape} of {state.first:g}" for state in program.states])
    return (
        f"What a call gives goes into the next one: {names}. A sequence starts with `{program.start}` = 0 and, for "
        f"each row, {first}."
    )


def into(state: StateTensor, start: str) -> str:
    """Where an output goes that gives a state tensor."""
    if not state.grows:
        return f"`{state.output}` as `{state.name}`"
    return f"`{state.output}`, which is written into `{state.name}` along axis {state.grows} from `{start}` on"


def onnx_code(engines: Sequence[Engine]) -> list[str]:
    """Lines that run engines with ONNX Runtime."""
    lines = ["import numpy as np", "import onnxruntime", ""]
    passes = any(engine.passed for engine in engines)
    lines += ["passed = {}", ""] if passes else []
    for engine in engines:
        lines += session_lines(engine)
        lines.append("inputs = {")
        lines += [f"    {call_of(value, 'np')}" for value in engine.inputs if value.name not in engine.passed]
        lines.append("}")
        if engine.passed:
            names = ", ".join(f'"{name}"' for name in engine.passed)
            lines.append(f"inputs |= {{name: passed[name] for name in [{names}]}}")
        lines += [
            "outputs = {value.name: array for value, array in zip(session.get_outputs(), session.run(None, inputs))}",
            "for name, array in outputs.items():",
            "    print(name, array.dtype, array.shape)",
        ]
        lines += ["passed |= outputs"] if passes else []
    return lines


def session_lines(engine: Engine) -> list[str]:
    """Lines that open a graph as it was opened when it was measured."""
    lines, more = [], ""
    if engine.plain or engine.options:
        lines, more = ["options = onnxruntime.SessionOptions()"], ", options"
        lines += [f'options.add_session_config_entry("{key}", "{value}")' for key, value in engine.options.items()]
    if engine.plain:
        lines.append("options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL")
    if engine.disabled:
        more += f", disabled_optimizers=[{', '.join(f'{chr(34)}{name}{chr(34)}' for name in engine.disabled)}]"
    path = f"{engine.folder}/{engine.file}"
    providers = f'providers=["{engine.provider}"]'
    return [*lines, f'session = onnxruntime.InferenceSession("{path}"{more}, {providers})']


def program_code(engine: Engine) -> list[str]:
    """Lines that run a program with one row of its input."""
    (given,) = engine.inputs
    return [
        "from runpy import run_path",
        "",
        f'program = run_path("{engine.folder}/{engine.file}")',
        f'print(program["logits_of"]({[given.fill] * given.shape[1]}))',
    ]


def package_code(engine: Engine) -> list[str]:
    """Lines that run a compiled package with PyTorch; it does not check what it is called with."""
    return [
        f'package = torch._inductor.aoti_load_package("{engine.folder}/{engine.file}")',
        "inputs = {",
        *(f"    {call_of(value, 'torch', device='')}" for value in engine.inputs),
        "}",
        "with torch.inference_mode():",
        "    found = package(**inputs)",
        f"names = {[value.name for value in engine.outputs]}",
        "outputs = dict(zip(names, found if isinstance(found, tuple) else [found]))",
        "for name, tensor in outputs.items():",
        "    print(name, tensor.dtype, tuple(tensor.shape))",
    ]


def tensorrt_code(engine: Engine) -> list[str]:
    """Lines that run an engine with TensorRT; PyTorch holds the memory."""
    return [
        f"import {engine.kind} as trt",
        "import torch",
        "",
        f'with open("{engine.folder}/{engine.file}", "rb") as file:',
        "    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(file.read())",
        "context = engine.create_execution_context()",
        "inputs = {",
        *(f"    {call_of(value, 'torch')}" for value in engine.inputs),
        "}",
        "for name, tensor in inputs.items():",
        "    context.set_input_shape(name, tuple(tensor.shape))",
        "    context.set_tensor_address(name, tensor.data_ptr())",
        "outputs = {}",
        "for name, dtype in {"
        + ", ".join(f'"{value.name}": torch.{value.dtype}' for value in engine.outputs)
        + "}.items():",
        '    outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")',
        "    context.set_tensor_address(name, outputs[name].data_ptr())",
        "context.execute_async_v3(torch.cuda.current_stream().cuda_stream)",
        "torch.cuda.synchronize()",
        "for name, tensor in outputs.items():",
        "    print(name, tensor.dtype, tuple(tensor.shape))",
    ]


def call_of(value: Value, library: str, *, device: str = ', device="cuda"') -> str:
    """One entry of a call, with the shape in words behind it; PyTorch's tensors lie on a device."""
    device = device if library == "torch" else ""
    kind = {"bool": "bool_" if library == "np" else "bool"}.get(value.dtype, value.dtype)
    made = f"{library}.full({value.shape}, {value.fill}, dtype={library}.{kind}{device})"
    return f'"{value.name}": {made},' + (f"  # {value.said}" if value.said else "")


def code(lines: Sequence[str]) -> str:
    """A block of Python."""
    return "\n".join(["```python", *lines, "```"])


def with_us() -> str:
    """How to use the whole folder where enginewright is installed."""
    block = code(
        ["import enginewright", "", 'engine = enginewright.load("THIS FOLDER")  # called like the original module']
    )
    return f"## With enginewright installed\n\n{block}"


def placed(engines: Sequence[Engine]) -> list[str]:
    """What is to be copied of the artifact: folders of engines, and files that lie elsewhere in it."""
    found = [
        place
        for engine in engines
        if engine.kind != "module"
        for place in ([f"engines/{engine.folder}"] if lies_inside(engine) else engine.files)
    ]
    return list(dict.fromkeys(found))
