"""Prove what a recogniser claims of a layer, on one real call, before a pass believes it.

A recogniser knows layers by their structure, and two layers of one structure can compute different things: RoFormer's
block has BERT's parts and turns its queries, SegFormer's feed-forward has ``fc1`` and ``fc2`` and a convolution between
them. So each claim is run: what a pass would put there, with nothing removed or with one part masked, must give what
the layer gives. What does not, or raises, is left alone with that reason.

Layers of one class and of the same shapes are proven once. Where weights hold no values, or are too many to be read
twice, the call is made on shapes alone: what raises or changes shape is found then, what computes another thing is not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from enginewright.passes.contract import Context, Inputs
from enginewright.passes.kernel.distance import relative_l2
from enginewright.passes.kernel.observe import After, Look, evaluating, looking, tensors_in
from enginewright.passes.kernel.on_shapes import on_shapes
from enginewright.passes.kernel.surgery import linear_like, share
from enginewright.passes.traits import FeedForward, HeadedAttention, layers_of, trait_of

LARGEST = 4 * 1024**3
"""Bytes of weights above which a model is not run for an audit, but looked at on shapes."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative L2 distance up to which two ways of computing one thing agree."""


@dataclass(frozen=True)
class Call:
    """One call of a layer: what it was given, and what it gave."""

    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    output: Any


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One call of a model, seen from some of its layers.

    Args:
        calls: all calls of each layer, by module path, in order; the model's own under ``""``.
        exact: whether the call was made on values; else on shapes alone.
        again: a block in which layers may be called again on what they were given.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    exact: bool
    again: Callable[[], AbstractContextManager[Any]]


def see(model: nn.Module, paths: Iterable[str], context: Context) -> Seen | None:
    """Make one call of a model and note what these layers were given and gave; None without a call to make."""
    call = first_call(context)
    if call is None:
        return None
    exact = has_values(model)
    shapes = partial(on_shapes, model, FakeTensorMode(allow_non_fake_inputs=True))
    seen = Seen(exact=exact, again=nullcontext if exact else shapes)

    def note(path: str) -> After:
        return lambda inputs, named, output: seen.calls.setdefault(path, []).append(Call(inputs, named, output))

    looks = [Look(model.get_submodule(path), after=note(path)) for path in {*paths, ""}]
    try:
        with quietly(model), seen.again(), looking(looks):
            model(**call)
    except Exception:
        if exact:
            raise
        return None  # shapes depend on values here, and there are none
    return seen


def first_call(context: Context) -> Inputs | None:
    """A call like those in use, or the example."""
    return next(iter(context.calibration), None) or context.example


def has_values(model: nn.Module) -> bool:
    """Whether the model can be run for an audit: its weights hold values, and not too many."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(t.is_meta for t in tensors) and sum(t.numel() * t.element_size() for t in tensors) <= LARGEST


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; a model that draws random numbers draws the same ones every time."""
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def signature(module: nn.Module) -> Any:
    """What layers that compute alike have in common: their classes, and the shapes of their tensors."""
    kinds = tuple((name, type(part)) for name, part in module.named_modules())
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return kinds, tuple((name, tuple(tensor.shape)) for name, tensor in tensors)


def disagreement(seen: Seen, call: Call, other: Callable[..., Any]) -> str:
    """How something else called in a layer's place differs from what the layer gave; empty when it does not."""
    try:
        with torch.no_grad(), seen.again():
            got = other(*call.inputs, **call.named)
    except Exception as fault:
        return raised(fault)
    return difference(call.output, got, exact=seen.exact)


def unlike(
    seen: Seen, blocks: Mapping[str, nn.Module], apart: Callable[[nn.Module], Callable[..., Any]]
) -> dict[str, str]:
    """Why some blocks do not compute what their family says, by path. Each kind of block is proven once.

    Args:
        seen: a call of the model.
        blocks: by path.
        apart: runs a block as its family says; called as the block is.
    """
    verdicts: dict[Any, str] = {}
    reasons: dict[str, str] = {}
    for path, block in blocks.items():
        call, key = seen.calls[path][0], signature(block)
        if key not in verdicts:
            with quietly(block):
                said = disagreement(seen, call, apart(block)) if repeats(seen, call, block) else ""
            kind = type(block).__name__
            looks = f"looks like a block that is known, and this {kind} does not compute like one: taken apart, {said}"
            verdicts[key] = looks if said else ""
        if verdicts[key]:
            reasons[path] = verdicts[key]
    return reasons


def repeats(seen: Seen, call: Call, module: nn.Module) -> bool:
    """Whether a layer called alone gives what it gave within the model; one that reads what a call left does not."""
    with quietly(module):
        return not disagreement(seen, call, module)


def raised(fault: Exception) -> str:
    """A fault in half a sentence: the first line of what it says."""
    text = str(fault).strip().splitlines()
    return f"it ends in {type(fault).__name__}: {text[0][:120]}" if text else f"it ends in {type(fault).__name__}"


def difference(wanted: Any, got: Any, *, exact: bool) -> str:
    """How two answers differ in form or, where they hold values, by more than rounding; empty when they do not."""
    got = unread(wanted, got)
    if form(wanted) != form(got):
        return f"it gives {words(got)}, and {words(wanted)} is wanted"
    if not exact:
        return ""
    worst = max((distance(a, b) for a, b in zip(tensors_in(wanted), tensors_in(got), strict=True)), default=0.0)
    return "" if worst <= 1 else "it gives other values"


def unread(wanted: Any, got: Any) -> Any:
    """An answer without the parts in whose place None is wanted: nobody reads them."""
    if isinstance(wanted, tuple) and isinstance(got, tuple) and len(wanted) == len(got):
        return tuple(None if w is None else g for w, g in zip(wanted, got, strict=True))
    return got


def distance(wanted: Tensor, got: Tensor) -> float:
    """Relative L2 distance over what is allowed; of tensors that hold no floats 0 when equal."""
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(wanted, got) else float("inf")
    if not torch.equal(wanted.isnan(), got.isnan()):
        return float("inf")
    return relative_l2(wanted.nan_to_num(), got.nan_to_num()) / TOLERANCE.get(wanted.dtype, 1e-1)


def form(answer: Any) -> Any:
    """An answer without its values: nested shapes."""
    if isinstance(answer, Tensor):
        return tuple(answer.shape)
    if isinstance(answer, Mapping):
        return tuple((name, form(part)) for name, part in answer.items())
    if isinstance(answer, tuple | list):
        return ("parts", *(form(part) for part in answer))
    return type(answer).__name__


def words(answer: Any) -> str:
    """An answer's form for a reader."""
    if isinstance(answer, Tensor):
        return f"a tensor {tuple(answer.shape)}"
    if isinstance(answer, tuple | list):
        return f"({', '.join(words(part) for part in answer)})"
    return "None" if answer is None else f"a {type(answer).__name__}"


def without_proof(
    model: nn.Module, layers: Mapping[str, HeadedAttention] | Mapping[str, FeedForward], context: Context
) -> dict[str, str]:
    """Why some of these layers are not what they look like, by module path; those that the call never reaches pass.

    With one head (or hidden unit) taken out a layer must give what it gives where nothing reads that head.
    """
    reasons: dict[str, str] = {}
    seen = see(model, layers, context) if layers else None
    verdicts: dict[Any, str] = {}
    for path, layer in layers.items():
        calls = [] if seen is None else seen.calls.get(path, [])
        if seen is None or not calls:
            continue
        module = model.get_submodule(path)
        key = (signature(module), form(calls[0].inputs), form(calls[0].named))
        if key not in verdicts:
            verdicts[key] = refuted(seen, calls[0], module, layer)
        if verdicts[key]:
            reasons[path] = verdicts[key]
    return reasons


def unproven(model: nn.Module, paths: Collection[str], context: Context) -> dict[str, str]:
    """Why some layers at these paths are not what they look like, as attention or as feed-forwards."""
    heads = {path: layer for path, layer in layers_of(model, HeadedAttention) if path in paths}
    hidden = {path: layer for path, layer in layers_of(model, FeedForward) if path in paths}
    return without_proof(model, heads, context) | without_proof(model, hidden, context)


def refuted(seen: Seen, call: Call, module: nn.Module, layer: HeadedAttention | FeedForward) -> str:
    """Why a layer does not compute what its family says; empty when it does."""
    heads = isinstance(layer, HeadedAttention)
    count = layer.heads if heads else layer.hidden  # type: ignore[union-attr]
    if count < 2 or not repeats(seen, call, module):
        return ""
    gone = count // 2
    kept = [number for number in range(count) if number != gone]
    trait: Any = HeadedAttention if heads else FeedForward
    small, silent = share(module), share(module)
    try:
        with torch.no_grad(), quietly(module):
            small_trait: Any = trait_of(small, trait)
            silent_trait: Any = trait_of(silent, trait)
            (small_trait.keep_heads if heads else small_trait.keep_hidden)(kept)
            silence(silent, silent_trait, gone)
            with seen.again():
                wanted = silent.eval()(*call.inputs, **call.named)
    except Exception as fault:
        return f"{looks(module, trait)}: {raised(fault)}"
    said = disagreement(
        seen, Call(call.inputs, call.named, first(wanted)), lambda *a, **k: first(small.eval()(*a, **k))
    )
    part = "head" if heads else "hidden unit"
    return f"{looks(module, trait)}: with one {part} taken out {said}" if said else ""


def looks(module: nn.Module, trait: type) -> str:
    """The start of a reason."""
    what = "attention" if trait is HeadedAttention else "feed-forward"
    return f"looks like a known {what}, and this {type(module).__name__} does not compute like one"


def first(answer: Any) -> Any:
    """The tensor that goes on: maps of attention that come along have a row for each head."""
    return next(tensors_in(answer), None)


def silence(module: nn.Module, layer: Any, number: int) -> None:
    """Let nothing read one head or hidden unit of a layer, which is a module of its own around shared tensors."""
    heads = isinstance(layer, HeadedAttention)
    start = number * layer.head_dim if heads else layer.first_column + number
    end = start + (layer.head_dim if heads else 1)
    for output in layer.outputs if heads else (layer.output,):
        weight = output.weight.detach().clone()
        weight[:, start:end] = 0
        bias = None if output.bias is None else output.bias.detach()
        for name, part in list(module.named_modules()):
            if part is output:
                parent, _, child = name.rpartition(".")
                setattr(module.get_submodule(parent), child, linear_like(output, weight, bias))
