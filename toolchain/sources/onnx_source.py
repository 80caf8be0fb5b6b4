"""ONNX files: ``onnx:FILE.onnx``, for graph passes, engines and validation; the file itself is the original.

Sizes and values that the file leaves open are guessed, or given behind a question mark:
``onnx:FILE.onnx?batch=1..8,height=48,width=64..320..640,ids=0..30000``. A dimension takes one size, or
smallest..largest, or smallest..typical..largest; an input's name takes the range of its values. The graph that is
written keeps its open dimensions: fixed ones can contradict a branch that such a size never enters.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from enginewright.ground.errors import FaultsError, ToolchainError, raise_faults, unknown
from enginewright.ground.signature import Dim, InputSpec
from enginewright.passes.kernel.graph_module import GraphModule
from enginewright.sources import short_name
from enginewright.sources.contract import Model, files_from
from enginewright.sources.sizes import Limits, dim_of, limits_from
from enginewright.targets.onnx_files import check_onnx, external_files
from enginewright.targets.weights import check, load_graph

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Whose operators ONNX Runtime knows."""

LEADING, OTHER = (1, 2, 8), (16, 64, 256)
"""Smallest, typical and largest size guessed for an input's first dimension, and for any other."""

MACHINE_PATH = re.compile(r"(?<![\w.:/])/[\w.-]+/[\w./-]+|\b[A-Za-z]:\\\w")
"""A path of the machine that made a file; not a node's name, which is kept whatever it looks like."""


def load(text: str, *, seed: int = 0, trust_remote_code: bool = False) -> Model:
    """Read an ONNX file.

    Args:
        text: ``onnx:FILE.onnx``, with sizes as above.
        seed: not used; a file holds its weights.
        trust_remote_code: not used; a graph is no code.

    Raises:
        ToolchainError: not whole, not valid, operators that no runtime here knows, inputs that are no tensors of
            numbers; a size that fits no dimension.
    """
    del seed, trust_remote_code
    place, _, asked = text.partition(":")[2].partition("?")
    path = Path(place)
    proto = check_onnx(path)
    given = limits_from(asked, text)
    inputs = inputs_of(proto, given, where=text)
    refuse_large(inputs, text)
    refuse_endless(proto.graph, path)
    check_valid(proto, path)
    graph = load_graph(path)
    refuse_strange_operators(graph, path)
    tidy(graph, {value.name: open_shape(value) for value in proto.graph.input})
    outputs = tuple(value.name or "" for value in graph.graph.outputs)
    guessed = {d.name: d for spec in inputs for d in spec.shape if isinstance(d, Dim) and d.name not in given}
    said = ", ".join(f"{d.name} {d.low} to {d.high}" for d in guessed.values())
    beside = {path.parent / location for location in external_files(proto)}
    return Model(
        name=short_name(text),
        module=GraphModule(graph, path).eval(),
        inputs=inputs,
        outputs=outputs,
        weights=f"in {path.name}" + (f"; sizes guessed: {said}" if said else ""),
        files=files_from(path, [path, *sorted(beside)]),
    )


LARGEST_INPUT = 2**30
"""Elements of one input at its typical size: more would take gigabytes before anything is compared."""

LONGEST_LOOP = 10**7
"""Trips of a loop that nothing but its count ends."""


def refuse_large(inputs: Sequence[InputSpec], where: str) -> None:
    """Raise for an input whose typical size no machine here would draw."""
    for spec in inputs:
        if (count := math.prod(spec.sizes())) > LARGEST_INPUT:
            raise ToolchainError(
                f"input {spec.name!r} has {count:,} elements at its typical size; drawn are up to {LARGEST_INPUT:,}",
                where=where,
                help="give smaller sizes: onnx:FILE.onnx?NAME=LOW..TYPICAL..HIGH",
            )


def refuse_endless(graph: onnx.GraphProto, path: Path) -> None:
    """Raise for a loop that runs longer than any run would wait, and that its condition never ends."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: each.t
        for node in graph.node
        for each in node.attribute
        if node.op_type == "Constant" and node.output and each.name == "value"
    }
    for node in graph.node:
        bodies = [each.g for each in node.attribute if each.type == onnx.AttributeProto.GRAPH]
        if node.op_type == "Loop" and bodies and node.input and (count := constants.get(node.input[0])) is not None:
            trips = int(onnx.numpy_helper.to_array(count).reshape(-1)[0]) if not count.external_data else 0
            if trips > LONGEST_LOOP and never_ends(bodies[0]):
                raise ToolchainError(
                    f"loop {node.name or node.output[0]!r} runs {trips:,} times, and nothing ends it before; refused",
                    where=str(path),
                )
        for body in bodies:
            refuse_endless(body, path)


def never_ends(body: onnx.GraphProto) -> bool:
    """Whether the condition that a loop's body gives is the one that it was handed, or a constant."""
    if not body.output or len(body.input) < 2:
        return True
    name = body.output[0].name
    made_by = {output: node for node in body.node for output in node.output}
    while (node := made_by.get(name)) is not None and node.op_type in ("Identity", "Cast"):
        name = node.input[0]
    return node is None or node.op_type == "Constant"


def check_valid(proto: onnx.ModelProto, path: Path) -> None:
    """Raise for outputs that cannot be compared, and for what the standard forbids."""
    for output in proto.graph.output:
        refuse_type(output, "output", str(path))
    try:
        check(path)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
        RuntimeError,
        OSError,
    ) as cause:
        first = next((line for line in str(cause).splitlines() if line.strip()), "")
        raise ToolchainError(f"{path.name} is not valid ONNX: {first}", where=str(path)) from cause


def refuse_type(value: onnx.ValueInfoProto, what: str, where: str) -> None:
    """Raise for anything but a tensor of numbers that numpy knows, with a known number of dimensions."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        said = (kind or "untyped").removesuffix("_type")
        raise ToolchainError(f"{what} {value.name!r} is no tensor but: {said}", where=where)
    number = value.type.tensor_type.elem_type
    if number not in onnx.TensorProto.DataType.values() or number == onnx.TensorProto.UNDEFINED:
        raise ToolchainError(f"{what} {value.name!r} has element type {number}, which ONNX does not know", where=where)
    name = onnx.TensorProto.DataType.Name(number)
    if onnx.helper.tensor_dtype_to_np_dtype(number).kind not in "biuf":
        raise ToolchainError(
            f"{what} {value.name!r} is of type {name}; only tensors of numbers can be drawn and compared",
            where=where,
            help="cut the graph before or after the nodes that work on it",
        )
    if not value.type.tensor_type.HasField("shape"):
        raise ToolchainError(
            f"{what} {value.name!r} has no known rank",
            where=where,
            help="export it again with a shape, or have onnx.shape_inference find it",
        )


def inputs_of(proto: onnx.ModelProto, given: dict[str, Limits] | None = None, *, where: str) -> tuple[InputSpec, ...]:
    """The input contract of a graph; initializers that are listed as inputs too are none.

    Args:
        proto: the graph.
        given: sizes of open dimensions and values of inputs, by name.
        where: what errors point at.
    """
    given = given or {}
    held = {tensor.name for tensor in proto.graph.initializer}
    values = [value for value in proto.graph.input if value.name not in held]
    for value in values:
        refuse_type(value, "input", where)
    shapes = {value.name: open_shape(value) for value in values}
    leading = {shape[0] for shape in shapes.values() if shape}
    dims = {d for shape in shapes.values() for d in shape if isinstance(d, str)}
    if strangers := [
        unknown("dimension or input", name, {*dims, *shapes}, where=where)
        for name in given.keys() - dims - shapes.keys()
    ]:
        raise FaultsError(strangers)
    sizes = {d: given.get(d) or Limits(*(LEADING if d in leading else OTHER)) for d in dims}
    return tuple(input_spec(value, shapes[value.name], sizes, given) for value in values)


def open_shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Sizes, and names of the open dimensions; one without a name is called after its input and axis."""
    return tuple(
        d.dim_value if d.dim_value > 0 else d.dim_param.strip("?") or f"{value.name}_{axis}"
        for axis, d in enumerate(value.type.tensor_type.shape.dim)
    )


def input_spec(
    value: onnx.ValueInfoProto, shape: tuple[int | str, ...], sizes: dict[str, Limits], given: dict[str, Limits]
) -> InputSpec:
    """One input; whole numbers are 0 and 1 unless a range is given."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    whole = dtype.kind in "iub"
    values = given.get(value.name) if value.name not in sizes else None
    if values is None and whole:
        values = Limits(0, 0, 1)
    return InputSpec(
        name=value.name,
        shape=tuple(d if isinstance(d, int) else dim_of(d, sizes[d]) for d in shape),
        dtype=dtype.name,
        low=values.low if values else None,
        high=values.high + whole if values else None,
        guessed=value.name not in given or value.name in sizes,
    )


def refuse_strange_operators(graph: ir.Model, path: Path) -> None:
    """Raise for operators of domains that neither ONNX Runtime nor the file's own functions know."""
    strange: dict[str, collections.Counter[str]] = {}
    for node in graph.graph.all_nodes():
        if node.domain not in DOMAINS and node.op_identifier() not in graph.functions:
            strange.setdefault(node.domain, collections.Counter())[node.op_type] += 1
    faults = [
        ToolchainError(
            f"no runtime here knows the domain {domain!r}: " + ", ".join(f"{op} ({n})" for op, n in counts.items()),
            where=str(path),
            help="export again without custom operators, or define them in the file as ONNX functions",
        )
        for domain, counts in strange.items()
    ]
    raise_faults(faults)


def tidy(graph: ir.Model, shapes: Mapping[str, tuple[int | str, ...]]) -> None:
    """Bring a graph into one form: weights as initializers, functions inlined, nodes and sizes named, no machine paths.

    What it computes and its opset stay.
    """
    for step in (
        common.InlinePass(),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(),  # small ones stay: branches need their values to infer shapes
        common.NameFixPass(),
    ):
        step(graph)
    # Before version 4 every initializer had to be an input too.
    graph.ir_version = max(graph.ir_version, 4)
    for value in graph.graph.inputs:
        value.shape = ir.Shape(shapes[value.name or ""])
    forget_paths(graph)


def forget_paths(graph: ir.Model) -> None:
    """Take out comments and metadata that hold a path of the machine that made the file."""
    nodes = list(graph.graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    things: list[Any] = [graph, graph.graph, *graph.graph.subgraphs(), *graph.graph.inputs, *nodes, *values]
    for thing in things:
        if thing.doc_string and MACHINE_PATH.search(thing.doc_string):
            thing.doc_string = None
        for key in [key for key, text in thing.metadata_props.items() if MACHINE_PATH.search(text)]:
            del thing.metadata_props[key]
