"""Exporting a module in another floating type than its weights have, without a second copy of the weights in memory.

The module is traced in the wanted type on tensors that have a shape and no content; then each initializer becomes what
the original holds: weights that are on disk stay there and get a Cast node, others are converted one by one as they
are written. Inputs and outputs keep the types of the module's contract.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IR_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


def hollow(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy of a module in ``dtype`` whose parameters have no content, and the original of each by its address.

    Buffers of the checkpoint are really converted: they are small. Those computed at building time (frequencies of
    timesteps and positions) keep their precision.
    """
    persistent = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    memo: dict[int, Any] = {}
    originals: dict[int, Tensor] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype in IR_TYPES and parameter.dtype != dtype:
            empty = nn.Parameter(
                torch.empty(parameter.shape, dtype=dtype), requires_grad=False
            )  # its pages stay unused
            memo[id(parameter)] = empty
            originals[empty.data_ptr()] = parameter
        else:
            memo[id(parameter)] = parameter
    for buffer in module.buffers():
        converts = buffer.dtype in IR_TYPES and id(buffer) in persistent
        memo[id(buffer)] = buffer.to(dtype) if converts else buffer
    return copy.deepcopy(module, memo), originals


def in_type(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs with floating ones in ``dtype``, but for those of one number a row: a timestep of 999 is no bfloat16."""
    return {
        name: tensor.to(dtype) if tensor.dtype in IR_TYPES and tensor.ndim > 1 else tensor
        for name, tensor in inputs.items()
    }


def restore(model: ir.Model, originals: Mapping[int, Tensor], dtype: torch.dtype, *, stays: Any) -> None:
    """Put the original tensors behind the hollow initializers.

    Args:
        model: traced from a hollow module; its initializers wrap the hollow tensors.
        originals: as ``hollow`` gave them.
        dtype: the type that the graph computes in.
        stays: called with an initializer; whether its bytes stay on disk, so that it needs a Cast node.
    """
    for name, value in list(model.graph.initializers.items()):
        constant: Any = value.const_value
        raw = getattr(constant, "raw", None)
        original = originals.get(raw.data_ptr()) if isinstance(raw, Tensor) else None
        if original is None:
            continue
        stored = ir.Value(name=f"{name}.stored", const_value=wrapped(original, f"{name}.stored"))
        if stays(stored):
            cast = ir.node("Cast", [stored], attributes={"to": IR_TYPES[dtype]})
            cast.outputs[0].name = f"{name}.cast"
            cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, IR_TYPES[dtype]
            stored.shape, stored.dtype = value.shape, IR_TYPES[original.dtype]
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            del model.graph.initializers[name]
            model.graph.register_initializer(stored)
            model.graph.insert_before(model.graph[0], cast)
        else:
            value.const_value = converted(original, dtype, name)


def wrapped(tensor: Tensor, name: str) -> Any:
    """A tensor as the exporter wraps it: no copy."""
    from torch.onnx._internal.exporter._core import TorchTensor

    return TorchTensor(tensor, name=name)


def converted(original: Tensor, dtype: torch.dtype, name: str) -> ir.LazyTensor:
    """A tensor in another type, made when it is written and dropped again."""
    return ir.LazyTensor(
        lambda: wrapped(original.detach().to(dtype), name),
        dtype=IR_TYPES[dtype],
        shape=ir.Shape(tuple(original.shape)),
        name=name,
    )


def keep_interface(model: ir.Model, example: Mapping[str, Tensor], results: ir.DataType) -> None:
    """Give the graph its contract's types again: floating inputs come as in ``example``, outputs go as ``results``."""
    graph = model.graph
    for value in list(graph.inputs):
        wanted = IR_TYPES.get(example[value.name or ""].dtype)
        if wanted is None or value.dtype == wanted or value.dtype is None:
            continue
        inner = value.dtype
        cast = ir.node("Cast", [value], attributes={"to": inner})
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.replace_input_with(0, value)
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = f"{value.name}.cast", value.shape, inner
        value.dtype = wanted
        graph.insert_before(graph[0], cast)
    for i, value in enumerate(graph.outputs):
        if value.dtype is None or value.dtype not in IR_TYPES.values() or value.dtype == results:
            continue
        cast = ir.node("Cast", [value], attributes={"to": results})
        result = cast.outputs[0]
        result.name, value.name = value.name, f"{value.name}.inner"
        result.shape, result.dtype = value.shape, results
        graph.append(cast)
        graph.outputs[i] = result
