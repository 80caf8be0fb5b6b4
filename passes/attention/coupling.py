"""What becomes of attention where the rows of a call are streams, and the tokens of one may attend to another's.

Everything that hangs on data comes in as a number: a bias that is added to scores, a gate of 0 or 1, a share. So the
graph is static, and at a gate of 0 a row gives what it gives alone.

Shapes: B rows, S streams that belong together, G = B/S groups of them, R rows that are changed in each group, H heads,
N tokens (text first, where there is any), E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from enginewright.passes.contract import Decision, NewInput
from enginewright.passes.kernel.wrap import Around, Call
from enginewright.passes.traits import RotaryAxes, TokenBlock

GATE, RATE, SCALE, BIAS, FEATURES = "couple_gate", "couple_rate", "couple_scale", "couple_bias", "couple_features"
"""Names of the inputs: whether a row is coupled, how far it is blended, what keys are multiplied by, what is added to
scores of the appended keys, and how far features are replaced."""

HIDDEN = -1e4
"""Added to the scores of a key that nobody sees: its weight is zero in float32 and in half precision."""

EPSILON = 1e-5
"""Added to variances."""

Mode = Literal["append", "replace", "blend", "channel_split"]


class CoupledBlock(Decision):
    """The rows of a block that read others, and what they read."""

    mode: Mode = Field(description="what the rows take from others")
    streams: int = Field(description="rows of a call that belong together")
    rows: tuple[int, ...] = Field(description="those of them that are changed, rising from 0")
    theta: float | None = Field(None, description="slowest wave of the rotary positions by which keys are shifted")
    widths: tuple[int, ...] | None = Field(None, description="features that each axis of those positions turns")


class CoupledFeature(Decision):
    """A module whose result in some rows becomes another row's."""

    streams: int = Field(description="rows of a call that belong together")
    source: int = Field(description="the row that gives")
    rows: tuple[int, ...] = Field(description="the rows that take, rising from 0")


@dataclass
class Given:
    """What the inputs of a model say of its coupling, while a call is made.

    Attributes:
        values: by name of the input, (B,) or (B, tokens) without the rows that are repeated inside.
        copies: how often the rows of a call follow one another inside (merged guidance runs them twice).
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    copies: int = 1

    @contextmanager
    def during(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Set for one run of the model, and clear."""
        self.values = dict(values)
        try:
            yield
        finally:
            self.values = {}

    def of(self, name: str, how: Streams, like: Tensor) -> Tensor | None:
        """An input in the rows that are changed, (G, R, 1, 1, 1) or (G, R, 1, 1, tokens); None where none was given.

        It has the type of ``like``, which it is put together with.
        """
        if name not in self.values:
            return None
        value = self.values[name].to(like.dtype)
        value = value.repeat(self.copies, *[1] * (value.ndim - 1))
        value = value if value.ndim > 1 else value[:, None]
        return how.changed(how.split(value))[:, :, None, None]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Which rows belong together, and which of them are changed.

    Args:
        count: of rows that belong together.
        rows: those that are changed, rising from 0.
    """

    count: int
    rows: tuple[int, ...]

    @property
    def others(self) -> tuple[int, ...]:
        """The rows that stay as they are."""
        return tuple(row for row in range(self.count) if row not in self.rows)

    def split(self, x: Tensor) -> Tensor:
        """(B, ...) -> (G, S, ...)."""
        return x.unflatten(0, (-1, self.count))

    def changed(self, x: Tensor) -> Tensor:
        """(G, S, ...) -> (G, R, ...)."""
        return picked(x, self.rows)

    def together(self, changed: Tensor, others: Tensor | None) -> Tensor:
        """Rows that were changed (G, R, ...) and those that were not (G, S - R, ...), in order -> (B, ...)."""
        order = [*self.rows, *self.others]
        both = changed if others is None else torch.cat([changed, others], dim=1)
        if order != sorted(order):
            both = picked(both, [order.index(row) for row in range(self.count)])
        return both.flatten(0, 1)


def picked(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of each group, (G, S, ...) -> (G, len(rows), ...)."""
    first, last = rows[0], rows[-1] + 1
    if list(rows) == list(range(first, last)):
        return x[:, first:last]
    return torch.stack([x[:, row] for row in rows], dim=1)


def mixed(own: Tensor | float, other: Tensor | float, share: Tensor | float | None) -> Any:
    """``share`` of the other and the rest of one's own; None: the other."""
    return other if share is None else share * other + (1 - share) * own


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of each row of each group: (G, R, H, N, E), keys and values (G, 1 or R, H, M, E) -> (G, R, H, N, E)."""
    shape = q.shape[:2]
    k, v = (x.expand(*shape, *x.shape[2:]) for x in (k, v))
    bias = None if bias is None else bias.expand(*shape, *bias.shape[2:]).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return found.unflatten(0, (-1, shape[1]))


def with_statistics(x: Tensor, like: Tensor) -> Tensor:
    """Tokens (..., N, E) moved and scaled to the mean and deviation that others have in each feature (AdaIN)."""
    deviation, wanted = (t.var(dim=-2, keepdim=True).add(EPSILON).sqrt() for t in (x, like))
    return (x - x.mean(dim=-2, keepdim=True)) / deviation * wanted + like.mean(dim=-2, keepdim=True)


def shifted(x: Tensor, shift: tuple[int, int], axes: RotaryAxes) -> Tensor:
    """Keys (..., N, E) that rotary positions have turned, as if they stood so many rows and columns further on.

    Two turns are one by the sum of their angles, so that no table of positions is needed.
    """
    steps = (*[0] * (len(axes.widths) - 2), *shift)
    angles = [
        step / axes.theta ** (pair / width)
        for step, width in zip(steps, axes.widths, strict=True)
        for pair in range(0, width, 2)
    ]
    angle = torch.tensor(angles, dtype=torch.float32, device=x.device)
    cos, sin = (table.repeat_interleave(2) for table in (angle.cos(), angle.sin()))  # (E,)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + crossed.float() * sin).to(x.dtype)


def loudest(result: Tensor, keep: int) -> Tensor:
    """1 in the channels of a row's result (G, 1, H, N, E) that vary most over its tokens, else 0: (G, 1, H, 1, E)."""
    variance = result.var(dim=-2)  # (G, 1, H, E)
    flat = variance.flatten(1)  # (G, H*E)
    places = flat.topk(min(keep, flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, places, 1.0).view_as(variance).unsqueeze(-2)


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """What the changed rows of every coupled block take from others.

    Args:
        mode: what.
        source: the row that gives keys and values, or for ``blend`` queries and keys.
        content: the row that gives queries, or for ``channel_split`` the loud channels.
        scores: the row whose result says which channels are loud.
        share: how far queries (and keys) go over to the other row's; None: the input ``couple_rate``.
        keep: channels that are loud.
        temperature: factor of the queries.
        key_scale: factor of the appended keys; None: the input ``couple_scale``.
        text_key_scale: factor of the keys of text.
        shift: rows and columns by which the appended keys stand further on.
        adain: give queries and keys of the image the source's mean and deviation.
        foreground: tokens of the source whose bias is the input ``couple_bias``; None: none is.
        gate: take the input ``couple_gate``.
    """

    mode: Mode
    source: int
    content: int | None = None
    scores: int | None = None
    share: float | None = None
    keep: int = 0
    temperature: float = 1.0
    key_scale: float | None = 1.0
    text_key_scale: float = 1.0
    shift: tuple[int, int] = (0, 0)
    adain: bool = False
    foreground: int | None = None
    gate: bool = False

    @property
    def blends(self) -> bool:
        """Whether queries go over to another row's by a share."""
        return self.mode == "blend" or (self.mode == "replace" and self.content is not None)

    @property
    def shares_map(self) -> bool:
        """Whether the changed rows attend as the source does and bring their own values alone: one map for all."""
        return self.mode == "blend" and self.share == 1 and not self.gate and self.temperature == 1

    def inputs(self, *, blocks: bool, features: bool) -> tuple[NewInput, ...]:
        """What a coupled model takes beside its own inputs.

        Args:
            blocks: whether any block is coupled.
            features: whether results of modules are replaced.
        """
        asked = {
            GATE: blocks and self.gate,
            RATE: blocks and self.blends and self.share is None,
            SCALE: blocks and self.mode == "append" and self.key_scale is None,
            FEATURES: features,
        }
        new = [NewInput(name=name, default=1.0) for name, there in asked.items() if there]
        if blocks and self.foreground is not None:
            new.append(NewInput(name=BIAS, shape=(self.foreground,)))
        return tuple(new)


Attend = Callable[[TokenBlock, Tensor], Tensor]
"""A call of a block, and what its attention reads (B, N, D) -> results of the heads (B, H, N, E)."""


def through(block: nn.Module, kind: type[TokenBlock], attend: Attend, *args: Any, **inputs: Any) -> Any:
    """What a block gives, run taken apart.

    Args:
        block: the block.
        kind: how a call of it is taken apart.
        attend: its attention.
        args: the call's.
        inputs: the call's.
    """
    x, more, named = kind.enter(*args, **inputs)
    call = kind(block, *more, **named)
    results = attend(call, call.attention_input(x))
    x = call.add_attention(x, call.output(results.transpose(1, 2).flatten(2)))
    x = call.add_feed_forward(x, call.feed_forward(call.feed_forward_input(x)))
    return kind.leave(x, *more, **named)


def alone(call: TokenBlock, y: Tensor) -> Tensor:
    """Each row attends to itself."""
    q, k, v = call.unturned_heads(y)
    return F.scaled_dot_product_attention(call.turned(q), call.turned(k), v)


@dataclass(frozen=True, kw_only=True)
class CoupledCall(Around):
    """A block, run taken apart, whose rows attend to one another.

    Args:
        block: the block.
        kind: how a call of it is taken apart.
        how: what rows take from others.
        streams: which rows.
        axes: of rotary positions, where keys are shifted.
        given: what the model's inputs say.
    """

    block: nn.Module
    kind: type[TokenBlock]
    how: Coupling
    streams: Streams
    axes: RotaryAxes | None
    given: Given

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """What the block gives."""
        del forward  # nothing else is around it: its parts are called one by one
        return through(self.block, self.kind, self.attend, *args, **inputs)

    def attend(self, call: TokenBlock, y: Tensor) -> Tensor:
        """What attention reads in all rows (B, N, D) -> results (B, H, N, E)."""
        if self.how.shares_map and not call.ahead:
            return self.one_map(call, y)
        q, k, v = (self.streams.split(each) for each in call.unturned_heads(y))  # each (G, S, H, N, E)
        rest = self.streams.others
        others = None
        if rest:
            own_q, own_k, own_v = (picked(x, rest) for x in (q, k, v))
            others = attention(call.turned(own_q), call.turned(own_k), own_v)
        if self.how.mode == "channel_split":
            assert others is not None, "rows whose results are read take nothing"
            changed = self.split_channels(call, q, k, v, others)
        else:
            changed = {"append": self.append, "replace": self.replace, "blend": self.blend}[self.how.mode](
                call, q, k, v
            )
        return self.streams.together(changed, others)

    def one_map(self, call: TokenBlock, y: Tensor) -> Tensor:
        """The same where all changed rows attend as the source does: one softmax, over the values of all side by side.

        Their queries and keys are not even made.
        """
        rows, source, taking = self.streams.split(y), self.how.source, self.streams.rows
        taking = tuple(row for row in taking if row != source)
        q, k, v = call.unturned_heads(rows[:, source])  # each (G, H, N, E)
        new = call.values(picked(rows, taking).flatten(0, 1)).unflatten(0, (-1, len(taking)))
        found = F.scaled_dot_product_attention(call.turned(q), call.turned(k), torch.cat([v, *new.unbind(1)], dim=-1))
        by_row = dict(zip((source, *taking), found.split(v.shape[-1], dim=-1), strict=True))
        if rest := tuple(row for row in self.streams.others if row != source):
            others = alone(call, picked(rows, rest).flatten(0, 1)).unflatten(0, (-1, len(rest)))
            by_row |= dict(zip(rest, others.unbind(1), strict=True))
        return torch.stack([by_row[row] for row in range(self.streams.count)], dim=1).flatten(0, 1)

    def append(self, call: TokenBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The source's keys and values behind one's own."""
        how, gate = self.how, self.given.of(GATE, self.streams, q)
        own_q, own_k, own_v = (self.streams.changed(x) for x in (q, k, v))
        if how.adain:
            own_q, own_k = (self.restyled(call, own, x, gate) for own, x in ((own_q, q), (own_k, k)))
        own_k = call.turned(own_k)
        if call.ahead and how.text_key_scale != 1:
            text, image = own_k[..., : call.ahead, :], own_k[..., call.ahead :, :]
            own_k = torch.cat([text * mixed(1.0, how.text_key_scale, gate), image], dim=-2)
        new_k, new_v = (x[..., call.ahead :, :] for x in (call.turned(row_of(k, how.source)), row_of(v, how.source)))
        if any(how.shift):
            assert self.axes is not None, "a plan shifts no keys without rotary positions"
            new_k = shifted(new_k, how.shift, self.axes)
        scale = self.given.of(SCALE, self.streams, k) if how.key_scale is None else how.key_scale
        new_k, new_v = (x.expand(*own_k.shape[:2], *x.shape[2:]) for x in (new_k, new_v))
        if scale is not None and not (isinstance(scale, float) and scale == 1):
            new_k = new_k * scale
        bias = self.bias(own_k, new_k, gate)
        heat = mixed(1.0, how.temperature, gate)
        own_q = call.turned(own_q) if how.temperature == 1 else call.turned(own_q) * heat
        return attention(own_q, torch.cat([own_k, new_k], dim=-2), torch.cat([own_v, new_v], dim=-2), bias)

    def bias(self, own: Tensor, new: Tensor, gate: Tensor | None) -> Tensor | None:
        """What is added to the scores of one's own keys, which is nothing, and of the appended ones."""
        bias = self.given.of(BIAS, self.streams, own)  # (G, R, 1, 1, tokens)
        if gate is not None:
            shut = (1 - gate) * HIDDEN
            bias = shut.expand(*shut.shape[:4], new.shape[-2]) if bias is None else bias + shut
        if bias is None:
            return None
        none = torch.zeros_like(own[:, :, :1, :, :1]).transpose(-1, -2)  # (G, R, 1, 1, N)
        return torch.cat([none, bias], dim=-1)

    def replace(self, call: TokenBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The source's keys and values in the place of one's own, and a share of another row's queries."""
        how, gate = self.how, self.given.of(GATE, self.streams, q)
        own_q, own_k, own_v = (self.streams.changed(x) for x in (q, k, v))
        if how.content is not None:
            own_q = self.taken(call, own_q, q, how.content, self.share(gate, q))
        own_k, own_v = (self.taken(call, own, x, how.source, gate) for own, x in ((own_k, k), (own_v, v)))
        return self.heated(call, own_q, own_k, own_v, gate)

    def blend(self, call: TokenBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A share of another row's queries and keys; values stay one's own."""
        gate = self.given.of(GATE, self.streams, q)
        own_q, own_k, own_v = (self.streams.changed(x) for x in (q, k, v))
        share = self.share(gate, q)
        own_q, own_k = (self.taken(call, own, x, self.how.source, share) for own, x in ((own_q, q), (own_k, k)))
        return self.heated(call, own_q, own_k, own_v, gate)

    def split_channels(self, call: TokenBlock, q: Tensor, k: Tensor, v: Tensor, others: Tensor) -> Tensor:
        """Loud channels of the content's own result, and all other channels from attention to the source.

        The authors' two attentions, over values with some channels at zero, are these: a channel of a result is made of
        that channel of the values alone.
        """
        how, gate = self.how, self.given.of(GATE, self.streams, q)
        assert how.content is not None
        assert how.scores is not None
        own_q, own_k, own_v = (self.streams.changed(x) for x in (q, k, v))
        own_k, own_v = (self.taken(call, own, x, how.source, gate) for own, x in ((own_k, k), (own_v, v)))
        style = self.heated(call, own_q, own_k, own_v, gate)
        if not how.keep:
            return style
        content, scores = (row_of(others, self.streams.others.index(row)) for row in (how.content, how.scores))
        mask = loudest(scores, how.keep)
        return mixed(style, content, mask if gate is None else mask * gate)  # type: ignore[no-any-return]

    def heated(self, call: TokenBlock, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        """What queries attend to, as sharply as the temperature says."""
        q = call.turned(q)
        if self.how.temperature != 1:
            q = q * mixed(1.0, self.how.temperature, gate)
        return attention(q, call.turned(k), v)

    def share(self, gate: Tensor | None, like: Tensor) -> Tensor | float | None:
        """How far a row goes over to another; None: all the way."""
        asked = self.given.of(RATE, self.streams, like) if self.how.share is None else self.how.share
        if asked is None or gate is None:
            return gate if asked is None else asked
        return asked * gate

    def restyled(self, call: TokenBlock, own: Tensor, x: Tensor, gate: Tensor | None) -> Tensor:
        """One's own tokens, those of the image with the mean and deviation of the source's of ``x``."""
        like = self.image(call, x)
        return self.of_image(call, own, lambda image: mixed(image, with_statistics(image, like), gate))

    def taken(self, call: TokenBlock, own: Tensor, x: Tensor, row: int, share: Tensor | float | None) -> Tensor:
        """One's own tokens (G, R, H, N, E), those of the image gone over to another row's of ``x`` by a share."""
        other = self.image(call, x, row)
        return self.of_image(call, own, lambda image: mixed(image, other.expand_as(image), share))

    def image(self, call: TokenBlock, x: Tensor, row: int | None = None) -> Tensor:
        """Tokens of the image of one row, the source where none is named: (G, 1, H, n, E)."""
        return row_of(x, self.how.source if row is None else row)[..., call.ahead :, :]

    @staticmethod
    def of_image(call: TokenBlock, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens with those of the image changed; text stays."""
        if not call.ahead:
            return change(x)
        return torch.cat([x[..., : call.ahead, :], change(x[..., call.ahead :, :])], dim=-2)


def row_of(x: Tensor, row: int) -> Tensor:
    """One row of each group, (G, S, ...) -> (G, 1, ...)."""
    return x[:, row : row + 1]


@dataclass(frozen=True, kw_only=True)
class CoupledResult(Around):
    """A module that gives in some rows what it gives in another.

    Args:
        source: that other row.
        streams: which rows take it.
        given: what the model's inputs say.
    """

    source: int
    streams: Streams
    given: Given

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """What the module gives, a tensor (B, ...)."""
        rows = self.streams.split(forward(*args, **inputs))
        own, other = self.streams.changed(rows), row_of(rows, self.source)
        share = self.given.of(FEATURES, self.streams, rows)
        share = share if share is None else share.view(*share.shape[:2], *[1] * (rows.ndim - 2))
        changed = mixed(own, other.expand_as(own), share)
        return self.streams.together(changed, picked(rows, self.streams.others))


@dataclass(frozen=True, kw_only=True)
class CoupledRows(Around):
    """A model whose rows read one another, with the inputs that steer it.

    Args:
        given: what the model's parts are told.
        names: of the inputs that it takes beside its own.
    """

    given: Given
    names: tuple[str, ...]

    @property
    def adds(self) -> tuple[str, ...]:
        """Those inputs."""
        return self.names

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """Call the model; an input that is left out is as if it were not asked for."""
        found = {name: inputs.pop(name, None) for name in self.names}
        with self.given.during({name: value for name, value in found.items() if value is not None}):
            return forward(*args, **inputs)
