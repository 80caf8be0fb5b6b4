"""SoftPAG inside a model: chosen attention heads pulled towards the identity map, by a strength given with each call.

Source: arXiv:2506.10978, equation 7: A' = (1-u) A + u I for a chosen head, so that its result O = A V becomes
O + u (V - O). No attention matrix is needed, so fused attention stays fused: a value projection notes the values that
it writes, and the projection that reads the heads' results blends them in before it reads.

Shapes: B batch, N tokens, W = heads times their width, S chosen heads of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from enginewright.passes.contract import Decision, NewInput
from enginewright.passes.kernel.rows import repeated_rows
from enginewright.passes.kernel.surgery import linear_at
from enginewright.passes.kernel.twofold import Twofold
from enginewright.passes.kernel.wrap import Around, Call, wrap
from enginewright.passes.traits import BlockStack, HeadedAttention, Stream, layer_at, layers_of

STRENGTH, WEIGHT = "pag_u", "pag_w"
"""Names of the inputs: how strongly each chosen head is perturbed, and how far the output moves away from that."""


class PerturbedHeads(Decision):
    """The heads of an attention layer that are perturbed."""

    heads: tuple[int, ...] = Field(description="which, rising from 0")
    of: int = Field(description="heads that the layer has")
    first: int = Field(description="where they begin among all heads that are perturbed, in the model's order")


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """What becomes of the chosen heads.

    Args:
        rows: tokens whose results are blended.
        u: strength; None makes it the input ``pag_u`` (B, S), 0 where a caller leaves it out.
        guidance: give e + w (e - e_perturbed) in one call.
        w: weight of the guidance; None makes it the input ``pag_w`` (B,), 0 where a caller leaves it out.
        channels: leading channels of the output that are guided; None: all.
    """

    rows: Literal["all", "image"]
    u: float | None
    guidance: bool
    w: float | None
    channels: int | None

    def inputs(self, chosen: int) -> tuple[NewInput, ...]:
        """What the model takes beside its own inputs when so many heads are chosen."""
        strength = NewInput(name=STRENGTH, shape=(chosen,)) if chosen and self.u is None else None
        weight = NewInput(name=WEIGHT) if chosen and self.guidance and self.w is None else None
        return tuple(each for each in (strength, weight) if each)

    def streams(self, layer: HeadedAttention) -> tuple[Stream, ...]:
        """The layer's streams that are blended."""
        return tuple(stream for stream in layer.streams if self.rows == "all" or stream.tokens == "own")

    def put_into(
        self, model: nn.Module, choice: Mapping[str, PerturbedHeads], names: Sequence[str], part: Twofold | None
    ) -> nn.Module:
        """Rewrite a network in place.

        Args:
            model: the network; of several one may have no chosen head.
            choice: what ``entries`` gave.
            names: of the inputs that it takes afterwards beside its own.
            part: what it gives where it runs plain and perturbed; None: it runs once.
        """
        if not choice and not names and part is None:
            return model
        call = OngoingCall(copies=repeated_rows(model))
        for path, chosen in choice.items():
            layer = layer_at(model, path, HeadedAttention)
            for stream in self.streams(layer):
                blend_in(stream, layer, chosen, call, place=f"{path}, {stream.tokens}")
        if part and not part.both:  # else the two runs differ from the first block on
            share_what_comes_before(model, call)
        wrap(model, Steering(perturbation=self, call=call, names=tuple(names), part=part))
        return model


def entries(chosen: Mapping[str, Iterable[int]], model: nn.Module) -> dict[str, PerturbedHeads]:
    """A plan's choice: for each layer its chosen heads."""
    found: dict[str, PerturbedHeads] = {}
    first = 0
    for path, layer in layers_of(model, HeadedAttention):
        if heads := sorted(chosen.get(path, ())):
            found[path] = PerturbedHeads(heads=tuple(heads), of=layer.heads, first=first)
            first += len(heads)
    return found


def names_of(choice: Mapping[str, PerturbedHeads]) -> list[str]:
    """``LAYER:HEAD`` for each chosen head, in the order of ``pag_u``."""
    layers = sorted(choice.items(), key=lambda item: item[1].first)
    return [f"{path}:{head}" for path, chosen in layers for head in chosen.heads]


@dataclass
class OngoingCall:
    """What the parts of a model tell one another while one call is made.

    Attributes:
        u: strength (B, S), or one for all; None: nothing is perturbed.
        values: by place, what a value projection wrote.
        results: by block, what it gave when nothing was perturbed; kept only for guidance.
        phase: whether blocks' results are noted, given again, or neither.
        touched: whether a head has been perturbed since ``u`` was set.
        copies: how often the rows of a call follow one another inside (merged guidance runs them twice).
    """

    u: Tensor | float | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    results: dict[int, list[Any]] = field(default_factory=dict)
    phase: Literal["", "note", "repeat"] = ""
    touched: bool = False
    copies: int = 1

    @contextmanager
    def during(self, *, u: Tensor | float | None, phase: Literal["", "note", "repeat"]) -> Iterator[None]:
        """Set for one run of the model, and clear."""
        self.u, self.phase, self.touched = u, phase, False
        try:
            yield
        finally:
            self.u, self.phase, self.touched = None, "", False
            self.values.clear()

    def once(self, block: object, run: Callable[[], Any]) -> Any:
        """What a block gives; not computed again while nothing before it was perturbed."""
        if self.phase == "repeat" and not self.touched:
            return self.results[id(block)].pop(0)
        result = run()
        if self.phase == "note":
            self.results.setdefault(id(block), []).append(result)
        return result


class NotedValues(nn.Module):
    """A projection that writes values, and notes them for the one that reads the heads' results."""

    def __init__(self, linear: nn.Module, call: OngoingCall, place: str) -> None:
        super().__init__()
        self.linear, self.call, self.place = linear, call, place

    def forward(self, x: Tensor) -> Tensor:
        """X (B, N, D) -> (B, N, W or more)."""
        out: Tensor = self.linear(x)
        if self.call.u is not None:
            self.call.values[self.place] = out
        return out


class BlendedHeads(nn.Module):
    """A projection that reads the heads' results, some of them moved towards their values first.

    Args:
        linear: the projection; the first W columns of its input are the heads' results.
        call: what is given with the call.
        place: under which the values are noted.
        columns: (S', W), for each head chosen here 1 in its columns.
        first: of its heads among all chosen ones.
        shared: how often a head's columns repeat its values.
        head_dim: columns of a head.
    """

    columns: Tensor

    def __init__(
        self,
        linear: nn.Module,
        call: OngoingCall,
        place: str,
        columns: Tensor,
        first: int,
        *,
        shared: int,
        head_dim: int,
    ) -> None:
        super().__init__()
        self.linear, self.call, self.place, self.first = linear, call, place, first
        self.shared, self.head_dim = shared, head_dim
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, N, W and more) -> (B, N, D)."""
        if self.call.u is None:
            return self.linear(x)
        self.call.touched = True
        width = self.columns.shape[1]
        value = self.call.values.pop(self.place)[..., -(width // self.shared) :]
        if self.shared > 1:
            one = value.unflatten(-1, (-1, 1, self.head_dim // self.shared))
            value = one.expand(*one.shape[:-2], self.shared, one.shape[-1]).flatten(-3)
        results, others = x[..., :width], x[..., width:]
        results = results + self.strength(x) * (value - results)
        return self.linear(torch.cat([results, others], dim=-1) if others.shape[-1] else results)

    def strength(self, x: Tensor) -> Tensor:
        """How strongly each column is blended: (B, 1, W), or (W,) where it is the same for every row."""
        u, columns = self.call.u, self.columns.to(x.dtype)
        if not isinstance(u, Tensor):
            assert u is not None
            return u * columns.sum(dim=0)
        rows = u[:, self.first : self.first + len(columns)].to(x.dtype) @ columns  # (B, W)
        rows = rows.repeat(self.call.copies, 1)
        return rows.view(-1, *[1] * (x.ndim - 2), rows.shape[1])


def blend_in(stream: Stream, layer: HeadedAttention, chosen: PerturbedHeads, call: OngoingCall, *, place: str) -> None:
    """Wrap the two projections of a stream."""
    values, output = linear_at(*stream.value), linear_at(*stream.output)
    columns = torch.zeros(len(chosen.heads), layer.heads, layer.head_dim, device=output.weight.device)
    for row, head in enumerate(chosen.heads):
        columns[row, head] = 1
    blended = BlendedHeads(
        output, call, place, columns.flatten(1), chosen.first, shared=stream.shared, head_dim=layer.head_dim
    )
    setattr(*stream.value, NotedValues(values, call, place).train(values.training))
    setattr(*stream.output, blended.train(output.training))


def share_what_comes_before(model: nn.Module, call: OngoingCall) -> None:
    """Let the blocks of every stack that hold no chosen head give again what they gave in the plain run."""
    for stack in [stack for _, stack in layers_of(model, BlockStack)]:
        for block in stack.blocks:
            if not any(isinstance(part, BlendedHeads) for part in block.modules()):
                wrap(block, GivenAgain(call))


def blocks_before(model: nn.Module, choice: Mapping[str, PerturbedHeads]) -> dict[str, int]:
    """By path of a stack, how many of its blocks come before the first one that holds a chosen head."""
    found = {}
    for path, stack in layers_of(model, BlockStack):
        holding = [any(f"{chosen}.".startswith(f"{path}.{i}.") for chosen in choice) for i in range(len(stack.blocks))]
        found[path] = holding.index(True) if any(holding) else len(holding)
    return found


@dataclass(frozen=True, eq=False)
class GivenAgain(Around):
    """A block that gives what it gave in the plain run, while nothing before it was perturbed."""

    call: OngoingCall

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """What the block gives."""
        return self.call.once(self, partial(forward, *args, **inputs))


@dataclass(frozen=True, kw_only=True)
class Steering(Around):
    """A model whose chosen heads are perturbed, and that may guide itself away from that.

    Args:
        perturbation: what becomes of the heads.
        call: what the model's parts tell one another.
        names: of the inputs that it takes beside its own.
        part: what it gives where it runs plain and perturbed, and what comes to it for both; None: it runs once.
    """

    perturbation: Perturbation
    call: OngoingCall
    names: tuple[str, ...]
    part: Twofold | None

    @property
    def adds(self) -> tuple[str, ...]:
        """Strength and weight, where they are inputs."""
        return self.names

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """Call the model: perturbed, or plain and perturbed and the two put together."""
        how, part = self.perturbation, self.part
        given = {name: inputs.pop(name, None) for name in self.names}
        u, w = given.get(STRENGTH), given.get(WEIGHT)
        u = (how.u or 0.0) if u is None else u
        if part is None:
            with self.call.during(u=u, phase=""):
                return forward(*args, **inputs)
        weight = (how.w or 0.0) if w is None else w
        try:
            with self.call.during(u=None, phase="note"):
                plain = forward(*args, **part.one_way(inputs, 0))
            with self.call.during(u=u, phase="repeat"):
                perturbed = forward(*args, **part.one_way(inputs, 1))
        finally:
            self.call.results.clear()
        return part.answer(plain, perturbed, lambda one, other: guided(one, other, weight, how.channels))


def guided(plain: Any, perturbed: Any, w: Tensor | float, channels: int | None) -> Any:
    """e + w (e - e_perturbed) of the first tensor that a model gives, or of its leading channels; the rest is plain."""
    tensors, form = pytree.tree_flatten(plain)
    e, other = cast(Tensor, tensors[0]), cast(Tensor, pytree.tree_flatten(perturbed)[0][0])
    weight = w.to(e.dtype).view(-1, *[1] * (e.ndim - 1)) if isinstance(w, Tensor) else w
    if channels is None or channels >= e.shape[1]:
        moved = e + weight * (e - other)
    else:
        head = e[:, :channels]
        moved = torch.cat([head + weight * (head - other[:, :channels]), e[:, channels:]], dim=1)
    return pytree.tree_unflatten([moved, *tensors[1:]], form)
