"""Part an ONNX graph in two: what hangs on some inputs alone, and the rest, which reads what the first part gives.

Every operation is parted, not only whole modules. Both files read the weights where the whole graph's lay, so none is
written twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from enginewright.ground.errors import ToolchainError
from enginewright.targets.weights import check, load_graph

ENLARGING = {"Expand", "Tile"}
"""What only repeats its input: cheaper to do again than to read."""

SIZES = {"Shape", "Size"}
"""What gives sizes; engines want to see these come from the tensors themselves."""


@dataclass(frozen=True, kw_only=True)
class Halves:
    """How two graphs are called.

    Args:
        prepare: inputs of the first.
        step: inputs of the second, without those that the first gives.
        passed: outputs of the first, which are inputs of the second.
    """

    prepare: tuple[str, ...]
    step: tuple[str, ...]
    passed: tuple[str, ...]


def split_graph(path: Path, constant: Sequence[str], prepare: Path, step: Path) -> Halves:
    """Write both halves of the graph in ``path`` beside it, and remove it; its weights stay where they are.

    Raises:
        ToolchainError: nothing in the graph hangs on these inputs alone.
    """
    whole = load_graph(path)
    passed = crossing(whole.graph, constant)
    if not passed:
        raise ToolchainError(f"no operation of the exported graph depends on {', '.join(constant)} alone")
    described(whole, passed)
    first, second = first_half(whole.clone(), passed), second_half(whole.clone(), passed, constant)
    for half, place in ((first, prepare), (second, step)):
        ir.save(half, place)
        check(place)
    path.unlink()
    outer = [name_of(value) for value in second.graph.inputs]
    return Halves(
        prepare=tuple(name_of(value) for value in first.graph.inputs),
        step=tuple(name for name in outer if name not in passed),
        passed=tuple(passed),
    )


def crossing(graph: ir.Graph, constant: Sequence[str]) -> list[str]:
    """Names of the values that hang on constant inputs alone and are read by what does not, in the graph's order."""
    known = {value for value in graph.inputs if value.name in constant}
    free = {value for value in graph.inputs if value not in known}
    sizes: set[ir.Value] = set()
    again: list[ir.Node] = []
    for node in graph:
        read = reads(node)
        if any(value in free for value in read) or any(value.is_graph_output() for value in node.outputs):
            free.update(node.outputs)
            again.append(node)
        elif any(value in known for value in read):
            known.update(node.outputs)
            if node.op_type in SIZES or all(value in sizes for value in read if value in known):
                sizes.update(node.outputs)
    passed: set[ir.Value] = set()
    done: set[ir.Node] = set()
    while again:
        node = again.pop()
        if node in done:
            continue
        done.add(node)
        for value in reads(node):
            producer = value.producer()
            if value not in known or producer is None:
                continue
            if producer.op_type in ENLARGING or value in sizes:
                again.append(producer)
            else:
                passed.add(value)
    return [name_of(value) for node in graph for value in node.outputs if value in passed]


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, its branches included."""
    return [value for value in (*node.inputs, *captured(node)) if value is not None]


def captured(node: ir.Node) -> Iterator[ir.Value | None]:
    """What the graphs inside a node read."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                yield from inner.inputs
            yield from attribute.as_graph().outputs


def described(model: ir.Model, names: Sequence[str]) -> None:
    """Have types and ranks of values found where the graph does not say them; a graph's input must have both."""
    values = values_of(model.graph)
    if any(values[name].dtype is None or values[name].shape is None for name in names):
        common.ShapeInferencePass()(model)


def first_half(model: ir.Model, passed: Sequence[str]) -> ir.Model:
    """The graph that gives the values that are passed."""
    graph = model.graph
    values = values_of(graph)
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in passed)
    return pruned(model, keep=())


def second_half(model: ir.Model, passed: Sequence[str], constant: Sequence[str]) -> ir.Model:
    """The graph that takes them."""
    graph = model.graph
    values = values_of(graph)
    for name in passed:
        value = values[name]
        given = ir.Value(name=name, shape=value.shape, type=value.type)
        ir.convenience.replace_all_uses_with(value, given)
        value.name = f"{name}.once"
        graph.inputs.append(given)
    return pruned(model, keep=[name_of(value) for value in graph.inputs if value.name not in constant])


def pruned(model: ir.Model, keep: Sequence[str]) -> ir.Model:
    """Without nodes, weights and inputs that nothing reads, but for inputs to keep."""
    common.RemoveUnusedNodesPass()(model)
    graph = model.graph
    # By what is left, because a branch that went still counts as a use of what it read.
    read = {value for node in graph for value in reads(node)} | set(graph.outputs)
    for value in list(graph.inputs):
        if value not in read and name_of(value) not in keep:
            graph.inputs.remove(value)
    for name, value in list(graph.initializers.items()):
        if value not in read:
            del graph.initializers[name]
    return model


def values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """What nodes give, by name."""
    return {name_of(value): value for node in graph for value in node.outputs}


def name_of(value: ir.Value) -> str:
    """The name, which every value of a file has."""
    assert value.name
    return value.name
