"""Let the rows of a call attend to one another's tokens: one carries the style or the content, the others take it.

Sources, each a setting of this one pass: AlignedGen (arXiv:2509.17088: ``append``, shifted positions, AdaIN on queries
and keys), FreeCus (arXiv:2507.15249: ``append`` with a bias for the foreground), AttenST (arXiv:2503.07307: ``replace``
with a share of the content's queries), DiffStyler (arXiv:2403.18461: ``blend`` of queries and keys, ``features``) and
StyleSculptor (arXiv:2509.13301: ``channel_split``).

Departures: caches of keys and values from a run before are a row of the same call here; boolean selections are biases
that are added to scores; a row that takes nothing is computed apart instead of behind a mask, with the same result;
StyleSculptor's second attention, over values with channels at zero, is read off the content's own; where DiffStyler's
share is 1 for good, one map of attention serves all rows. In blocks of image and text (SD3, Flux) image tokens alone
are given and taken, and SD3.5's second attention over the image stays as it is.

Checked beside Jiexuanz/AlignedGen at commit 454797c, Monalissaa/FreeCus at commit 1f33f71, cheese-jerry/AttenST at
commit 23f6822, lishaoxu1994/DiffStyler at commit 6f1165d and quzefan/StyleSculptor at commit 3bc2bc7 by reading: the
order of norm, AdaIN, positions, scaling and appending, what is scaled, which rows are masked, which channels are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError, raise_faults
from enginewright.ground.facts import ALL_TOKENS, INDEPENDENT_ROWS, ONE_NETWORK, STATELESS_CALLS, Fact
from enginewright.passes.attention.coupling import (
    CoupledBlock,
    CoupledCall,
    CoupledFeature,
    CoupledResult,
    CoupledRows,
    Coupling,
    Given,
    Mode,
    Streams,
    alone,
    through,
)
from enginewright.passes.contract import Context, Decision, Facts, NewInput, Pass, Plan, in_rows
from enginewright.passes.kernel.audit import Seen, see, unlike
from enginewright.passes.kernel.rows import repeated_rows
from enginewright.passes.kernel.selection import check_patterns
from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.wrap import all_around, wrap
from enginewright.passes.networks import (
    called_by,
    each_network,
    given_beside,
    local,
    networks_of,
    place_of,
    program_of,
    taking,
)
from enginewright.passes.traits import RotaryAxes, TokenBlock, TokenStack, layers_of

Blocks = Mapping[str, tuple[nn.Module, TokenStack]]
"""Blocks of a model, and the stack of each, by path."""


class StreamFacts(Facts):
    """What all decisions of a plan have in common."""

    streams: int = Field(description="rows of a call that belong together")


class CoupleStreams(Pass):
    """Append, replace, blend or split what attention reads, between rows of a call that belong together."""

    intends: ClassVar[str] = "the original whose rows read one another"
    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS, ONE_NETWORK, STATELESS_CALLS, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (INDEPENDENT_ROWS,)
    looks_for: ClassVar[str] = "blocks whose attention can be taken apart"
    decisions: ClassVar[tuple[type[Decision], ...]] = (CoupledBlock, CoupledFeature)
    facts: ClassVar[type[Facts]] = StreamFacts

    mode: Mode = Field(
        "append",
        description="append: the source's keys and values behind one's own (AlignedGen, FreeCus); replace: in their "
        "place (AttenST); blend: a share of its queries and keys, values stay (DiffStyler); channel_split: loud "
        "channels of the content's result, all others from the source (StyleSculptor)",
    )
    layers: tuple[str, ...] = Field(("*",), description="glob patterns of the paths of the blocks that are coupled")
    streams: int = Field(2, ge=2, description="rows of a call that belong together; a call has a multiple of them")
    rows: tuple[int, ...] = Field(
        (), description="of those the ones that take; none: all but source, content and scores, which stay as alone"
    )
    source: int = Field(0, ge=0, description="row that gives keys and values, or what is blended: reference or style")
    content: int | None = Field(
        None, ge=0, description="row that gives queries (replace) or loud channels (channel_split); left out: none"
    )
    scores: int | None = Field(
        None, ge=0, description="channel_split: row whose result says which channels are loud, StyleSculptor's edge map"
    )
    share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="how far queries (replace), or queries and keys (blend), go over to the other row's: AttenST 0.75; "
        "left out, it is the input couple_rate (batch): DiffStyler min(1, 2t/1000), 0 outside of its window of steps, "
        "which is 25 of 50 with an adapter and all without in the released script, 0.5 and 0.8 in its configuration",
    )
    keep: int | None = Field(
        None,
        ge=0,
        description="channel_split: channels that are loud; StyleSculptor of 1,024: 1024 to 925 in the structure "
        "network, 1024 to 0 in the latent one",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="factor of queries: AttenST 1.5 as written, 2.25 as its code works, which applies it twice",
    )
    key_scale: float | Literal["input"] = Field(
        1.0,
        description="append: factor of the appended keys: 1.1 in AlignedGen's released script, (t/1000)² by its "
        "class's default; 1.1 in FreeCus; input makes it couple_scale (batch)",
    )
    text_key_scale: float = Field(
        1.0,
        gt=0,
        description="append: factor of the keys of text in rows that take: 1.1 in FreeCus' code; the "
        "paper's own value was not found",
    )
    shift: tuple[int, int] = Field(
        (0, 0), description="append: rows and columns that the appended keys stand further on: AlignedGen (0, width)"
    )
    adain: bool = Field(
        False, description="append: give queries and keys of the image the source's mean and deviation first"
    )
    foreground: int | None = Field(
        None,
        ge=1,
        description="append: so many tokens of the source get a bias each, the input couple_bias (batch, tokens): 0 "
        "where they are seen, -10000 where not",
    )
    gate: bool = Field(
        False, description="take the input couple_gate (batch): 1 couples a row, 0 leaves it as alone, by step"
    )
    features: tuple[str, ...] = Field(
        (),
        description="glob patterns of modules whose result in the rows that take becomes the source's, by the input "
        "couple_features (batch): DiffStyler's up_blocks.1.resnets.1.conv2",
    )

    def refuse_incomplete(self) -> None:
        """Rows must be there, and no setting may be given that the mode does not read."""
        asked = {"source": self.source, "content": self.content, "scores": self.scores}
        named = {name: row for name, row in asked.items() if row is not None}
        named |= {f"rows[{i}]": row for i, row in enumerate(self.rows)}
        faults = [
            ToolchainError(f"{name} is {row}; {self.streams} streams are rows 0 to {self.streams - 1}", where=name)
            for name, row in named.items()
            if not 0 <= row < self.streams
        ]
        faults += [
            ToolchainError(f"{name} says nothing to mode = {self.mode!r}", where=name)
            for name, modes in READ_IN.items()
            if self.differs(name) and self.mode not in modes
        ]
        faults += [
            ToolchainError(f"mode = {self.mode!r} needs {name}", where=name)
            for name in ("content", "scores", "keep")
            if self.mode == "channel_split" and getattr(self, name) is None
        ]
        if self.key_scale != "input" and self.key_scale <= 0:
            faults.append(
                ToolchainError(f"key_scale is {self.key_scale}; it must be above 0, or input", where="key_scale")
            )
        if self.mode == "replace" and self.share is not None and self.content is None:
            faults.append(ToolchainError("share needs content, the row whose queries are taken", where="share"))
        if not self.taking:
            faults.append(ToolchainError("every stream gives, and none is left to take", where="rows"))
        if self.mode == "channel_split" and {self.content, self.scores} & {*self.taking}:
            faults.append(ToolchainError("rows has one whose result is read: content or scores", where="rows"))
        if self.features and self.source in self.taking:
            faults.append(ToolchainError(f"rows has {self.source}, whose features the others take", where="rows"))
        raise_faults(faults)

    def differs(self, name: str) -> bool:
        """Whether a setting is another than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def taking(self) -> tuple[int, ...]:
        """Rows that take, rising from 0."""
        giving = {self.source, self.content, self.scores}
        return tuple(sorted(set(self.rows))) or tuple(row for row in range(self.streams) if row not in giving)

    @property
    def coupling(self) -> Coupling:
        """What they take."""
        return Coupling(
            mode=self.mode,
            source=self.source,
            content=self.content,
            scores=self.scores,
            share=self.share,
            keep=self.keep or 0,
            temperature=self.temperature,
            key_scale=None if self.key_scale == "input" else self.key_scale,
            text_key_scale=self.text_key_scale,
            shift=self.shift,
            adain=self.adain,
            foreground=self.foreground,
            gate=self.gate,
        )

    def plan(self, model: nn.Module, context: Context) -> Plan[CoupledBlock | CoupledFeature]:
        """Find the blocks.

        Raises ``ToolchainError`` for a pattern that matches none, and for a call that cannot have so many rows.
        """
        context = in_rows(context, self.streams)
        blocks = blocks_of(model)
        check_patterns(self.layers, blocks, what="block", setting="layers") if blocks else None
        axes = next((found for _, found in layers_of(model, RotaryAxes)), None)
        skipped = {path: reason for path in blocks if (reason := self.reason_to_skip(path, blocks, axes))}
        left = {path: block for path, block in blocks.items() if path not in skipped}
        skipped |= self.unfit(model, left, context)
        choice: dict[str, CoupledBlock | CoupledFeature] = {
            path: self.decision(axes) for path in left if path not in skipped
        }
        return Plan(
            choice=choice | self.replaced_features(model), skipped=skipped, facts=StreamFacts(streams=self.streams)
        )

    def rewrite(self, model: nn.Module, plan: Plan[CoupledBlock | CoupledFeature]) -> nn.Module:
        """Run the blocks taken apart, in place. Raises ``ToolchainError`` where the model lacks one of the plan."""
        return self.coupled(model, plan.choice)

    def new_inputs(self, plan: Plan[CoupledBlock | CoupledFeature]) -> tuple[NewInput, ...]:
        """Gate, share, factor and bias, as far as they are asked for."""
        return self.inputs(plan.choice)

    def rows_together(self, plan: Plan[CoupledBlock | CoupledFeature]) -> int:
        """The streams, where anything is coupled."""
        return self.streams if plan.choice else 1

    def intended(self, model: nn.Module, plan: Plan[CoupledBlock | CoupledFeature], context: Context) -> nn.Module:
        """The original, coupled in the same way."""
        del context
        axes = next((found for _, found in layers_of(model, RotaryAxes)), None)
        blocks = blocks_of(model)
        asked = [path for path in blocks if path not in plan.skipped and not self.reason_to_skip(path, blocks, axes)]
        choice: dict[str, CoupledBlock | CoupledFeature] = {path: self.decision(axes) for path in asked}
        return self.coupled(share(model), choice | self.replaced_features(model)) if plan.choice else model

    def decision(self, axes: RotaryAxes | None) -> CoupledBlock:
        """What is decided for each block."""
        more: dict[str, Any] = {"theta": axes.theta, "widths": axes.widths} if axes and any(self.shift) else {}
        return CoupledBlock(mode=self.mode, streams=self.streams, rows=self.taking, **more)

    def reason_to_skip(self, path: str, blocks: Blocks, axes: RotaryAxes | None) -> str:
        """Why a block is left alone, before any call is made; empty when it is not."""
        block, stack = blocks[path]
        if not any(fnmatchcase(path, pattern) for pattern in self.layers):
            return "it is not among the blocks to couple"
        if all_around(block):
            return "something runs around it already, and would be lost"
        if stack.padded:
            return "some of its tokens may be padding, which other rows would read"
        if stack.joint and self.mode == "channel_split":
            return "image and text attend together there, and channels are split of tokens of one kind"
        if any(self.shift) and axes is None:
            return "shift turns keys by rotary positions, and there are none"
        return ""

    def unfit(self, model: nn.Module, blocks: Blocks, context: Context) -> dict[str, str]:
        """Blocks that do not compute as their family says, run on other rows or on other tokens, as one call shows."""
        seen = see(model, blocks, context) if blocks else None
        if seen is None:
            return {}
        called = {path: block for path, block in blocks.items() if path in seen.calls}
        skipped = {path: reason for path, block in called.items() if (reason := self.misfit(seen, path, block))}
        for kind in {stack.block for _, stack in called.values()}:
            mine = {path: block for path, (block, stack) in called.items() if stack.block is kind}
            skipped |= unlike(seen, mine, partial(taken_apart, kind))
        return skipped

    def misfit(self, seen: Seen, path: str, found: tuple[nn.Module, TokenStack]) -> str:
        """Why a block's rows or tokens are not those that are asked for; empty when they are."""
        (block, stack), call = found, seen.calls[path][0]
        x, more, named = stack.block.enter(*call.inputs, **call.named)
        tokens = x.shape[1] - stack.block(block, *more, **named).ahead
        if x.shape[0] % self.streams:
            return f"it runs on {x.shape[0]} rows, of which {self.streams} cannot belong together"
        if self.foreground is not None and tokens != self.foreground:
            return f"it runs on {tokens} tokens, and the bias is for {self.foreground}"
        return ""

    def replaced_features(self, model: nn.Module) -> dict[str, CoupledFeature]:
        """The modules whose results are replaced. Raises ``ToolchainError`` for a pattern that matches none."""
        paths = [path for path, _ in model.named_modules() if path]
        check_patterns(self.features, paths, what="module", setting="features")
        found = CoupledFeature(streams=self.streams, source=self.source, rows=self.taking)
        return {path: found for path in paths if any(fnmatchcase(path, pattern) for pattern in self.features)}

    def inputs(self, choice: Mapping[str, Decision]) -> tuple[NewInput, ...]:
        """What a model takes beside its own inputs after this choice."""
        blocks = any(isinstance(each, CoupledBlock) for each in choice.values())
        features = any(isinstance(each, CoupledFeature) for each in choice.values())
        return self.coupling.inputs(blocks=blocks, features=features)

    def coupled(self, model: nn.Module, choice: Mapping[str, CoupledBlock | CoupledFeature]) -> nn.Module:
        """Carry a choice out, in place."""
        program, own = program_of(model), {name: local(choice, place_of(model, name)) for name in networks_of(model)}
        names = [each.name for each in self.inputs(choice)]
        added = {
            name: given_beside(program, name, names, {each.name for each in self.inputs(mine)})
            for name, mine in own.items()
        }
        each_network(model, lambda net, name: self.put_into(net, own[name], tuple(added[name])))
        return called_by(model, taking(program, added))

    def put_into(
        self, model: nn.Module, choice: Mapping[str, CoupledBlock | CoupledFeature], names: tuple[str, ...]
    ) -> nn.Module:
        """Couple the rows of one network, in place."""
        given, blocks = Given(copies=repeated_rows(model)), blocks_of(model)
        for path, found in choice.items():
            streams = Streams(count=found.streams, rows=found.rows)
            if isinstance(found, CoupledFeature):
                result = CoupledResult(source=found.source, streams=streams, given=given)
                wrap(model.get_submodule(path), result)
                continue
            if path not in blocks:
                raise ToolchainError("the plan couples a block that this model has not", where=path)
            block, stack = blocks[path]
            axes = RotaryAxes(theta=found.theta, widths=found.widths) if found.theta and found.widths else None
            kind, how = stack.block, self.coupling
            wrap(block, CoupledCall(block=block, kind=kind, how=how, streams=streams, axes=axes, given=given))
        if names:
            wrap(model, CoupledRows(given=given, names=names))
        return model


READ_IN: Mapping[str, tuple[Mode, ...]] = {
    "content": ("replace", "channel_split"),
    "scores": ("channel_split",),
    "keep": ("channel_split",),
    "share": ("replace", "blend"),
    **dict.fromkeys(("key_scale", "text_key_scale", "shift", "adain", "foreground"), ("append",)),
}
"""The modes that read a setting; all read those that are not named."""


def taken_apart(kind: type[TokenBlock], block: nn.Module) -> Callable[..., Any]:
    """What runs a block in its parts, each row to itself."""
    return partial(through, block, kind, alone)


def blocks_of(model: nn.Module) -> Blocks:
    """Blocks whose calls can be taken apart, and the stack of each, by path."""
    return {
        f"{stack.path_in(owner)}.{number}": (block, stack)
        for owner, stack in layers_of(model, TokenStack)
        for number, block in enumerate(stack.blocks)
    }
