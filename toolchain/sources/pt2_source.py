"""An exported program: ``pt2:FILE.pt2``, as ``torch.export.save`` writes it.

Its graph becomes a module that takes tensors by name and returns a tensor or a flat tuple. Linear layers become
``nn.Linear`` again, under the paths that they had, so that passes find them; everything else stays operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import first_line
from enginewright.sources import examples, pt2_archive
from enginewright.sources.contract import Model, files_from

LINEAR = torch.ops.aten.linear.default
HIGHEST = 64
"""Largest size of a dynamic dimension whose program names no upper bound, unless the example is larger."""


def load(text: str, *, seed: int = 0, trust_remote_code: bool = False) -> Model:
    """Read a program; nothing in the file is unpickled or run.

    Args:
        text: ``pt2:FILE.pt2``; a relative path starts at the current folder.
        seed: without effect: the file brings its weights.
        trust_remote_code: without effect: there is no code.

    Raises:
        ToolchainError: not a whole archive, refused content, or a program that no engine can stand in for.
    """
    del seed, trust_remote_code
    path = Path(text.removeprefix("pt2:")).absolute()
    program = pt2_archive.read(path)
    try:
        return model_of(program, path)
    except ToolchainError:
        raise
    except Exception as cause:  # what the loader let pass may still contradict itself, anywhere in torch
        raise ToolchainError(
            f"{path.name} holds a program that cannot be run: {first_line(cause)}",
            where=str(path),
            help=pt2_archive.SAVE_AGAIN,
        ) from cause


def model_of(program: ExportedProgram, path: Path) -> Model:
    """The model that a program is, after one call of it."""
    where = str(path)
    refuse_state(program, where)
    module = as_module(program, where)
    inputs = example_of(program, module, where)
    args, kwargs = program.example_inputs
    with torch.no_grad():
        answer = program.module(check_guards=False)(*args, **kwargs)
    interface, outputs = examples.interface_of_answer(answer, inputs, (), where=where)
    return Model(
        name=f"pt2:{path.name}",
        module=module,
        inputs=examples.input_specs(inputs, dynamic_axes(program, inputs, where), {}, where=where),
        outputs=outputs,
        weights=f"from {path.name}",
        example=examples.arrays_of(inputs),
        interface=interface,
        files=files_from(path, [path]),
    )


def refuse_state(program: ExportedProgram, where: str) -> None:
    """Refuse programs in training mode, and those that change their buffers or inputs: an engine keeps no state."""
    operators = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    for node in operators:
        given = arguments_of(node)
        if given.get("train") is True or given.get("training") is True:
            raise ToolchainError(
                f"the program was exported in training mode: {node.target} at {node.name!r}",
                where=where,
                help="call module.eval() before torch.export.export",
            )
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    # Before decomposition nothing is lifted out: in-place operators reach a placeholder, perhaps through views of it.
    origin: dict[Any, str] = {
        node: signature.inputs_to_buffers.get(node.name, node.name)
        for node in program.graph.find_nodes(op="placeholder")
    }
    for node in operators:
        given = arguments_of(node)
        aliased = [argument for argument in node.target._schema.arguments if argument.alias_info is not None]
        for argument in aliased:
            if given.get(argument.name) in origin:
                origin[node] = origin[given[argument.name]]
                changed += [origin[node]] if argument.alias_info.is_write else []
    if changed:
        raise ToolchainError(f"the program changes its own {changed[0]!r}; an engine keeps no state", where=where)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """What an operator is called with, by name; defaults are left out. Lists become tuples, to be looked up."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = {**dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)), **node.kwargs}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def as_module(program: ExportedProgram, where: str) -> fx.GraphModule:
    """The program as a module that can be copied, set to eval and exported again."""
    unlifted = program.module(check_guards=False)
    unlifted.graph.set_codegen(fx.graph.CodeGen())  # arguments by name, a flat answer; and no trees to copy
    flatten_answer(unlifted.graph, where)
    module = fx.GraphModule(unlifted, unlifted.graph)
    restore_linears(module)
    module.recompile()
    return module.eval()


def flatten_answer(graph: fx.Graph, where: str) -> None:
    """Let the graph return its one tensor, or a tuple of its tensors; what is None or a plain number goes."""
    (output,) = graph.find_nodes(op="output")
    kept = [node for node in output.args[0] if not (node is None or isinstance(node, int | float | str))]
    for node in kept:
        if not (isinstance(node, fx.Node) and isinstance(node.meta.get("val", torch.empty(0)), Tensor)):
            raise ToolchainError(f"the program returns {str(node)!r}, which is no tensor", where=where)
    output.args = (kept[0],) if len(kept) == 1 else (tuple(kept),)


def restore_linears(module: fx.GraphModule) -> None:
    """Put an ``nn.Linear`` where the graph applies a weight and bias that one module of the original held alone."""
    users: dict[str, set[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        users.setdefault(str(node.target), set()).update(node.users)
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        x, weight, bias = (*node.args, None)[:3]
        path = linear_path(weight, bias)
        if not path or not holds_alone(module, path, users):
            continue
        layer = module.get_submodule(path)
        if not isinstance(layer, nn.Linear):
            module.set_submodule(path, linear_of(layer))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(path, (x,))
        call.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)


def linear_path(weight: Any, bias: Any) -> str:
    """The module path whose ``weight`` and ``bias`` these nodes read; empty when they are not of one module."""
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return ""
    path, _, leaf = str(weight.target).rpartition(".")
    if bias is not None and not (isinstance(bias, fx.Node) and str(bias.target) == f"{path}.bias"):
        return ""
    return path if leaf == "weight" else ""


def holds_alone(module: fx.GraphModule, path: str, users: Mapping[str, set[fx.Node]]) -> bool:
    """Whether a module has a weight and perhaps a bias, nothing else, read by linear operators alone."""
    holder = module.get_submodule(path)
    named = dict(holder.named_parameters())
    if isinstance(holder, nn.Linear):
        return True  # restored at an earlier call of the same layer
    calls = users[f"{path}.weight"]
    whole = {"weight"} | ({"bias"} & named.keys())
    return (
        named.keys() == whole
        and not [*holder.children(), *holder.buffers()]
        and all(call.target is LINEAR for call in calls)
        and all(users.get(f"{path}.{name}", set()) == calls for name in whole)
        and all(linear_path(*(*call.args[1:], None)[:2]) == path for call in calls)
        and all((len(call.args) > 2) == ("bias" in named) for call in calls)
    )


def linear_of(holder: nn.Module) -> nn.Linear:
    """A linear layer around a module's own parameters."""
    weight, bias = holder.get_parameter("weight"), dict(holder.named_parameters()).get("bias")
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def example_of(program: ExportedProgram, module: fx.GraphModule, where: str) -> dict[str, Tensor]:
    """The example that the program was exported with, by the names of its inputs."""
    if not program.example_inputs:
        raise ToolchainError("the program holds no example inputs", where=where, help=pt2_archive.SAVE_AGAIN)
    leaves = torch.utils._pytree.tree_leaves(program.example_inputs)
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    inputs = dict(zip(names, leaves, strict=True))
    if constants := [name for name, value in inputs.items() if not isinstance(value, Tensor)]:
        raise ToolchainError(
            f"input {constants[0]!r} of the program is the constant {inputs[constants[0]]!r}",
            where=where,
            help="export a module whose forward takes tensors alone",
        )
    return examples.by_name(module, inputs, where=where)


def dynamic_axes(program: ExportedProgram, inputs: Mapping[str, Tensor], where: str) -> examples.DynamicAxes:
    """The axes that the program leaves open, with their ranges.

    The archive keeps no names: the first symbol at an axis 0 is ``batch``, another ``NAME_AXIS`` of where it first
    stands. A size of ``4*s`` comes in multiples of 4. Without an upper bound the largest size is 64 or the example's.
    """
    metas = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    shapes = {name: metas[user].shape for name, user in zip(inputs, program.graph_signature.user_inputs, strict=True)}
    names: dict[Any, str] = {}  # of sizes as they are written: s and 4*s are two dimensions
    axes: dict[str, dict[int, tuple[str, int, int] | tuple[str, int, int, int]]] = {name: {} for name in inputs}
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            if isinstance(size, int):
                continue
            step, symbol = size.node.expr.as_coeff_Mul()
            if not symbol.is_Symbol or not step.is_Integer:
                raise ToolchainError(
                    f"size {axis} of input {name!r} is {size.node.expr}, bound to another size",
                    where=where,
                    help="export with a Dim of its own for each size, or a fixed one",
                )
            first = "batch" if axis == 0 and "batch" not in names.values() else f"{name}_{axis}"
            multiple, example = int(step), inputs[name].shape[axis]
            ranges = {str(formula): found for formula, found in program.range_constraints.items()}
            found = ranges[str(symbol)]
            low = multiple * max(1, int(found.lower))
            high = multiple * int(found.upper) if found.upper.is_Integer else max(HIGHEST, example)
            if multiple > 1 and str(size.node.expr) in ranges:  # that of the symbol starts at 2, whatever was declared
                low = max(multiple, int(ranges[str(size.node.expr)].lower))
            entry = (names.setdefault(size.node.expr, first), low, high // multiple * multiple)
            axes[name][axis] = (*entry, multiple) if multiple > 1 else entry
    return axes
