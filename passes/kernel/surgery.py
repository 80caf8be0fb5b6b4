"""Make layers physically smaller: keep some rows or columns of a linear layer, some heads of an attention layer.

Nothing here draws random numbers, and everything works on meta tensors too.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.traits import FeedForward, FixedAttention, HeadedAttention, Place, Stream

INERT = (nn.Dropout, nn.Identity)


def share(module: nn.Module) -> nn.Module:
    """A copy of the modules around the same tensors; passes replace tensors and never write into one."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def several_names(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules that are registered more than once, by identity: the parents that hold each, and its name there."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name))
    return {identity: found for identity, found in places.items() if len(found) > 1}


def follow(old: nn.Module, new: nn.Module, places: Sequence[tuple[nn.Module, str]]) -> None:
    """Put what took a module's place under its other names too, so that they are one module still."""
    for parent, name in places:
        if parent._modules.get(name) is old:
            parent._modules[name] = new


def keep_rows(linear: nn.Linear, rows: Sequence[int]) -> nn.Linear:
    """A linear layer with these output features only, in this order; weight (out, in) -> (len(rows), in)."""
    bias = None if linear.bias is None else pick(linear.bias, rows, dim=0)
    return linear_like(linear, pick(linear.weight, rows, dim=0), bias)


def keep_columns(linear: nn.Linear, columns: Sequence[int]) -> nn.Linear:
    """A linear layer that reads these input features only, in this order; weight (out, in) -> (out, len(columns))."""
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return linear_like(linear, pick(linear.weight, columns, dim=1), bias)


def pick(tensor: Tensor, indices: Sequence[int], *, dim: int) -> Tensor:
    """A contiguous copy of these slices of a tensor."""
    return tensor.detach().index_select(dim, torch.tensor(indices, dtype=torch.long, device=tensor.device))


def linear_like(original: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around this weight (out, in) and bias (out,), trainable and in training mode as the original."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.dtype)  # meta: no random start
    layer.weight = nn.Parameter(weight, requires_grad=original.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=original.bias.requires_grad)
    return layer.train(original.training)


def head_indices(kept: Sequence[int], *, heads: int, head_dim: int, stacks: int = 1) -> list[int]:
    """The features that these heads own when ``stacks`` (3 for a fused q, k, v) groups of all heads lie in a row."""
    starts = [(stack * heads + head) * head_dim for stack in range(stacks) for head in kept]
    return [start + offset for start in starts for offset in range(head_dim)]


@dataclass(frozen=True, kw_only=True)
class ProjectedAttention(HeadedAttention):
    """Heads that live in the rows of some input projections and in the columns of one output projection.

    Args:
        core: the module that owns the input projections and the layer's own counts.
        inputs: names of those projections in ``core``; the last one writes the values of the layer's own tokens.
        stacks: how often all heads follow one another in an input projection: 3 for a fused q, k, v; by name, where
            they differ.
        holder: the module that owns the output projection.
        output_name: its name there.
        counts: the attributes of ``core`` that grow with the number of heads, and by how much for each head.
        others: columns of the output projection that follow the heads' and read something else.
        tokens: what the layer's own tokens are.
        text: the text that attends along with them.
        crossed: whether the values are of other tokens than the queries.
        gives: what the layer returns, for one that says nothing; None where that is not known.
        shared: input projections that have one head where the others have several (grouped-query attention), and how
            many; such a group counts as one head here, ``head_dim`` wide in all, because its keys serve all of it.
        by_head: names of parameters of ``core`` that have an entry for each head, along the first axis.
    """

    core: nn.Module
    inputs: tuple[str, ...]
    stacks: int | Mapping[str, int]
    holder: nn.Module
    output_name: str
    heads: int
    head_dim: int
    counts: Mapping[str, int]
    others: int = 0
    tokens: Literal["own", "both"] = "own"
    text: Stream | None = None
    crossed: bool = False
    gives: Literal["tensor", "tensor and weights"] | None = None
    shared: Mapping[str, int] = field(default_factory=dict)
    by_head: tuple[str, ...] = ()

    def stacks_of(self, name: str) -> int:
        """How often all heads follow one another in one input projection."""
        return self.stacks if isinstance(self.stacks, int) else self.stacks[name]

    @property
    def output(self) -> nn.Linear:  # type: ignore[override]
        """The projection (D, H*head_dim + others) that reads all heads' results."""
        return linear_at(self.holder, self.output_name)

    @property
    def outputs(self) -> tuple[nn.Linear, ...]:  # type: ignore[override]
        """Every projection that reads heads' results."""
        return (self.output, *(linear_at(*stream.output) for stream in self.of_text()))

    @property
    def streams(self) -> tuple[Stream, ...]:  # type: ignore[override]
        """The layer's own tokens, then the text."""
        if self.crossed:
            return ()
        values = self.inputs[-1]
        own = Stream(
            value=(self.core, values),
            output=(self.holder, self.output_name),
            tokens=self.tokens,
            shared=self.shared.get(values, 1),
        )
        return (own, *self.of_text())

    def of_text(self) -> tuple[Stream, ...]:
        """The text's stream, if there is one."""
        return () if self.text is None else (self.text,)

    def keep_heads(self, kept: Sequence[int]) -> None:
        """Take every other head out of the projections and set the layer's counts. Spent afterwards: ask anew."""
        assert kept, "a layer needs at least one head"
        assert set(kept) <= set(range(self.heads)), f"heads {kept} of {self.heads}"
        for name in self.inputs:
            width = self.head_dim // self.shared.get(name, 1)
            rows = head_indices(kept, heads=self.heads, head_dim=width, stacks=self.stacks_of(name))
            setattr(self.core, name, keep_rows(linear_at(self.core, name), rows))
        for name in self.by_head:
            entries: nn.Parameter = getattr(self.core, name)
            left = pick(entries, kept, dim=0)
            setattr(self.core, name, nn.Parameter(left, requires_grad=entries.requires_grad))
        columns = head_indices(kept, heads=self.heads, head_dim=self.head_dim)
        width = self.heads * self.head_dim
        others = range(width, width + self.others)
        setattr(self.holder, self.output_name, keep_columns(self.output, [*columns, *others]))
        for stream in self.of_text():
            setattr(*stream.output, keep_columns(linear_at(*stream.output), columns))
        for name, each in self.counts.items():
            setattr(self.core, name, each * len(kept))

    def silence(self, model: nn.Module, path: str) -> None:
        """Replace the core by one that answers zeros; where it is not the whole layer, the projection falls away too.

        The projection's bias goes with it. What else the layer holds (BERT's residual and norm) stays.
        """
        if self.gives is None:
            super().silence(model, path)
        silent = Silent(self.output.out_features, with_weights=self.gives == "tensor and weights")
        layer = model.get_submodule(path)
        if layer is self.core:
            put_at(model, path, silent)
            return
        name = next(name for name, child in layer.named_children() if child is self.core)
        setattr(layer, name, silent)
        setattr(self.holder, self.output_name, nn.Identity())


class Zeros(nn.Module):
    """Answers zeros (..., width) to x (..., D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., width)."""
        return x.new_zeros((*x.shape[:-1], self.width))


class Silent(Zeros):
    """Takes what an attention layer takes and answers zeros, with None for weights where its family returns them."""

    def __init__(self, width: int, *, with_weights: bool = False) -> None:
        super().__init__(width)
        self.with_weights = with_weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument decides the shape."""
        zeros = super().forward(args[0] if args else next(iter(kwargs.values())))
        return (zeros, None) if self.with_weights else zeros


def put_at(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@dataclass(frozen=True, kw_only=True)
class ProjectedFeedForward(FeedForward):
    """Hidden units that live in the rows of some input projections and in the columns of one output projection.

    Args:
        layer: the module that answers.
        writers: where the input projections are.
        stacks: how often all units follow one another in an input projection.
        reader: where the output projection is.
        first_column: of its input that is a hidden unit.
        chain: the modules that, called one after the other, are the layer; the first is replaced by the whole and the
            others by nothing. Empty: ``layer`` itself. None: it cannot be told apart.
        counts: attributes that say how many hidden units there are.
    """

    layer: nn.Module
    writers: tuple[Place, ...]
    stacks: int
    reader: Place
    first_column: int = 0
    chain: tuple[Place, ...] | None = ()
    counts: tuple[Place, ...] = ()

    @property
    def inputs(self) -> tuple[nn.Linear, ...]:  # type: ignore[override]
        """The projections (stacks*H, D) that write the hidden units."""
        return tuple(linear_at(*place) for place in self.writers)

    @property
    def output(self) -> nn.Linear:  # type: ignore[override]
        """The projection (D, first_column + H) that reads them."""
        return linear_at(*self.reader)

    @property
    def hidden(self) -> int:  # type: ignore[override]
        """Hidden units."""
        return self.output.in_features - self.first_column

    def keep_hidden(self, kept: Sequence[int]) -> None:
        """Take every other hidden unit out of the projections, and set the layer's own counts."""
        hidden = self.hidden
        assert kept, "a layer needs at least one hidden unit"
        assert set(kept) <= set(range(hidden)), f"units {kept} of {hidden}"
        rows = [stack * hidden + unit for stack in range(self.stacks) for unit in kept]
        for owner, name in self.writers:
            setattr(owner, name, keep_rows(linear_at(owner, name), rows))
        columns = [*range(self.first_column), *(self.first_column + unit for unit in kept)]
        setattr(*self.reader, keep_columns(self.output, columns))
        for owner, name in self.counts:
            setattr(owner, name, len(kept))

    def standalone(self, kept: Sequence[int]) -> nn.Module:
        """The layer's modules copied around the same tensors, then cut."""
        if self.chain is None:
            raise inseparable(self.layer)
        tensors = [*self.layer.parameters(), *self.layer.buffers()]
        twin = copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})
        twin.keep_hidden(kept)
        return nn.Sequential(*(getattr(*place) for place in twin.chain or ())) if twin.chain else twin.layer

    def replace_in(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Replace the layer, or the first module of its chain and the rest by nothing."""
        if self.chain is None:
            raise inseparable(self.layer, path)
        if not self.chain:
            put_at(model, path, module)
            return
        for number, (owner, name) in enumerate(self.chain):
            setattr(owner, name, nn.Identity() if number else module)


def inseparable(layer: nn.Module, path: str | None = None) -> ToolchainError:
    """The error for a feed-forward that shares a projection with something else."""
    kind = type(layer).__name__
    return ToolchainError(f"the feed-forward of a {kind} shares a projection with its attention", where=path)


def projected_feed_forward(layer: ProjectedFeedForward) -> FeedForward | None:
    """The feed-forward, if its projections are plain and of the sizes that it needs."""
    places = (*layer.writers, layer.reader)
    if any(type(getattr(*place, None)) is not nn.Linear for place in places):
        return None
    width = layer.stacks * layer.hidden
    return layer if layer.hidden > 0 and all(linear.out_features == width for linear in layer.inputs) else None


def linear_at(owner: nn.Module, name: str) -> nn.Linear:
    """A linear child."""
    layer = getattr(owner, name)
    assert isinstance(layer, nn.Linear), f"{name} is a {type(layer).__name__}"
    return layer


def projected_attention(
    attention: ProjectedAttention, *, whole: Collection[str] = ()
) -> HeadedAttention | FixedAttention:
    """The attention as it stands if all of it can be cut, or why it cannot.

    Args:
        attention: how the layer is put together, if it is what it looks like.
        whole: parts of ``core`` that stay as they are when heads go, because they never see them.
    """
    known = {*attention.inputs, *attention.by_head, *whole}
    if attention.holder is attention.core:
        known.add(attention.output_name)
    known |= {stream.output[1] for stream in attention.of_text()}
    reason = next(obstacles(attention, known), None)
    return attention if reason is None else FixedAttention(reason)


def obstacles(attention: ProjectedAttention, known: Collection[str]) -> Iterator[str]:
    """Why the heads of a layer cannot be taken out; nothing when they can."""
    core, holder = attention.core, attention.holder
    for name in own_parts(core):
        if name not in known:
            yield f"its part {name!r} may depend on the heads"
    outputs = [(holder, attention.output_name), *(stream.output for stream in attention.of_text())]
    owners = [*((core, name) for name in attention.inputs), *outputs]
    for owner, name in owners:
        kind = type(getattr(owner, name))
        if kind is not nn.Linear:
            yield f"its {name!r} is a {kind.__name__}, not a plain Linear"
            return
    width = attention.heads * attention.head_dim
    sizes = {name: linear_at(core, name).out_features for name in attention.inputs}
    shared = attention.shared
    if any(size * shared.get(name, 1) != attention.stacks_of(name) * width for name, size in sizes.items()):
        yield f"its {attention.heads} heads of {attention.head_dim} do not fill its projections: {sizes}"
    if other := [name for name in attention.by_head if len(getattr(core, name)) != attention.heads]:
        yield f"its {other[0]!r} has not an entry for each of its {attention.heads} heads"
    for output, others in zip(attention.outputs, (attention.others, 0), strict=False):
        if output.in_features != width + others:
            yield f"its output projection reads {output.in_features - others} features, its heads write {width}"


def own_parts(module: nn.Module) -> Iterator[str]:
    """Names of a module's direct children, parameters and buffers that can change what it computes."""
    yield from (name for name, child in module.named_children() if not isinstance(child, INERT))
    yield from (name for name, _ in module.named_parameters(recurse=False))
    yield from (name for name, _ in module.named_buffers(recurse=False))
