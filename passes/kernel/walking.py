"""Whether blocks can be left out of a stack: what the model hands to the blocks that stay must not change.

A model may read a list by a block's position (which mask, which rotary table), add something between two blocks, or
hand what one block gave to a later one. So a model is walked through with blocks that hand their input on: that costs
almost nothing, and shows what each block is given beside the stream, before blocks are left out and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.passes.contract import Context
from enginewright.passes.kernel.audit import Call, Seen, first_call, form, quietly, raised, see
from enginewright.passes.kernel.observe import tensors_in
from enginewright.passes.kernel.surgery import share
from enginewright.passes.traits import BlockStack, layer_at


@dataclass
class Walk:
    """What a model gave to the blocks of a stack and gave itself, while blocks handed their input on."""

    given: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    output: Any = None


def why_not_without(model: nn.Module, path: str, stack: BlockStack, gone: Sequence[int], context: Context) -> str:
    """Why a stack must keep all of its blocks, tried with some of them left out; empty where it need not."""
    blocks = range(len(stack.blocks))
    seen = see(model, [f"{path}.{i}" for i in blocks], context)
    if seen is None or any(len(seen.calls.get(f"{path}.{i}", ())) != 1 for i in blocks):
        return ""  # nothing to try it on; blocks that do not run once a call are for the pass to judge
    calls = [seen.calls[f"{path}.{i}"][0] for i in blocks]
    if reason := unchained(calls, seen):
        return reason
    if not gone or any(p.is_meta for p in model.parameters()):
        return ""
    kept = [i for i in blocks if i not in gone]
    try:
        before = walked(model, path, calls, list(blocks), context)
    except Exception:
        return ""  # it cannot be walked through, so nothing is known
    try:
        after = walked(model, path, calls, kept, context)
    except Exception as fault:
        return f"the model does not run without blocks {list(gone)}: {raised(fault)}"
    for number in kept:
        if said := changed(before.given.get(number), after.given.get(number), calls[number].output):
            return f"the model goes by a block's place in the stack: without blocks {list(gone)}, block {number} {said}"
    if form(before.output) != form(after.output):
        return f"without blocks {list(gone)} the model gives something of another form"
    return ""


def unchained(calls: Sequence[Call], seen: Seen) -> str:
    """Where a block reads something else than what the one before it gave, or also what an earlier one gave."""
    for number, call in enumerate(calls[1:], start=1):
        before = list(tensors_in(calls[number - 1].output))
        x = stream_of(call)
        alike = [tensor for tensor in before if tensor.shape == x.shape]
        if seen.exact and alike and not any(same(tensor, x) for tensor in alike):
            return f"block {number} reads something else than what block {number - 1} gave: the model adds to it"
        earlier = {id(t): i for i, past in enumerate(calls[: number - 1]) for t in tensors_in(past.output)}
        earlier = {key: i for key, i in earlier.items() if key not in {id(t) for t in before}}
        for tensor in tensors_in([call.inputs, call.named]):
            if id(tensor) in earlier:
                return f"block {number} also reads what block {earlier[id(tensor)]} gave (a long skip)"
    return ""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same, not-a-numbers included."""
    return a is b or (torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()))


def stream_of(call: Call) -> Tensor:
    """The tokens that a block is called with."""
    found: Tensor = call.named["hidden_states"] if "hidden_states" in call.named else call.inputs[0]
    return found


def walked(model: nn.Module, path: str, calls: Sequence[Call], kept: Sequence[int], context: Context) -> Walk:
    """Walk through a model that has these blocks of a stack alone."""
    twin, walk = share(model), Walk()
    stack = layer_at(twin, path, BlockStack)
    for number, block in enumerate(stack.blocks):

        def handed_on(*inputs: Any, number: int = number, **named: Any) -> Any:
            walk.given[number] = (inputs, named)
            return handing_on(calls[number].output, inputs, named)

        block.forward = handed_on
    if len(kept) < len(stack.blocks):
        stack.keep_blocks(kept)
    with quietly(twin):
        walk.output = twin(**(first_call(context) or {}))
    return walk


def handing_on(output: Any, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """An answer of a block's form, made of tensors that it was given; zeros where it was given none of a shape."""
    text = [named["encoder_hidden_states"]] if named.get("encoder_hidden_states") is not None else []
    free = list(tensors_in([text, inputs, named]))

    def answer(part: Any) -> Any:
        if isinstance(part, Tensor):
            fitting = next((t for t in free if t.shape == part.shape and t.dtype == part.dtype), None)
            if fitting is None:
                return torch.zeros(part.shape, dtype=part.dtype)
            free[:] = [t for t in free if t is not fitting]
            return fitting
        if isinstance(part, tuple | list):
            return type(part)(answer(each) for each in part)
        return part

    return answer(output)


def changed(before: tuple[Any, Any] | None, after: tuple[Any, Any] | None, output: Any) -> str:
    """What a block is given otherwise than before, streams apart; empty when nothing is."""
    if before is None or after is None:
        return "" if before is after else "is not called any more"
    streams = {tuple(tensor.shape) for tensor in tensors_in(output)}
    if form(before) != form(after):
        return "is given something of another form"
    names = [*map(str, range(len(before[0]))), *before[1]]
    for name, old, new in zip(names, [*before[0], *before[1].values()], [*after[0], *after[1].values()], strict=True):
        for a, b in zip(tensors_in(old), tensors_in(new), strict=True):
            if tuple(a.shape) not in streams and not same(a, b):
                return f"is given another {name!r}"
        if isinstance(old, bool | int | float | str) and old != new:
            return f"is given another {name!r}"
    return ""
