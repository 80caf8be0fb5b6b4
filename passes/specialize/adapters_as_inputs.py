"""Make adapters inputs of the network: one engine for a base and all its adapters, switched with a call.

Ours; y = W x + B A x as in LoRA, Hu et al. 2021, arXiv:2106.09685, with A and B read from inputs instead of weights.
Matrices of equal shape lie in one input, one behind the other, so that a network of hundreds of layers has a handful:
``adapter_down_D`` (layers, rank, D) holds the A of all layers that read D features, ``adapter_up_D`` (layers, D, rank)
the B of all that write D. The rank is fixed; smaller adapters are filled up with zeros, which is exact. alpha / r is in
B. ``enginewright.adapter_inputs`` makes these arrays of an adapter's file. They stay the same over a sampling run.

With ``inputs = "strength"`` the matrices of given files stay in the engine and only how much each file counts is an
input, ``adapter_strength`` (files,).

Neither is fused: what the side paths cost is in the report, as multiply-accumulates. DoRA, LoHa, LoKr and biases are
no products of two matrices beside a layer, and kernels of more than one cell cannot be inputs of engines:
``fold_adapters`` takes those. The base may be quantized before or after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import ONE_NETWORK, Fact
from enginewright.passes.contract import Context, Decision, Facts, NewInput, Pass, Plan, macs, macs_by_module
from enginewright.passes.kernel.selection import check_patterns
from enginewright.passes.kernel.surgery import put_at, share
from enginewright.passes.kernel.wrap import wrap
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
from enginewright.passes.specialize.adapter_files import (
    Adapter,
    AdapterFile,
    named_by_files,
    network_config,
    read_adapters,
)
from enginewright.passes.specialize.side_paths import (
    Entry,
    GivenMatrices,
    GivenStrength,
    OngoingCall,
    SidePath,
    TakingAdapters,
    Widths,
    adaptable,
)

STRENGTH = "adapter_strength"
"""The input that says how much each file counts."""

TRIED = 0.3
"""Size of what drawn adapters add to a layer's output, beside inputs of size 1, where engines are compared."""


class AdaptedByInputs(Decision):
    """A layer whose adapter's matrices are inputs."""

    rank: int = Field(description="of the matrices")
    reads: int = Field(description="features that the layer reads")
    writes: int = Field(description="features that it writes")
    down: int = Field(description="place of its A among those of all layers that read as many")
    up: int = Field(description="place of its B among those of all layers that write as many")


class AdaptedByStrength(Decision):
    """A layer with the matrices of some files beside it."""

    arrays: ClassVar[Mapping[str, str]] = {
        ".down": "A of all files, one below the other",
        ".up": "B of all files, side by side, times alpha / r",
    }

    ranks: tuple[int, ...] = Field(description="of each file's adapter for this layer; 0: it has none")


class SidePathFacts(Facts):
    """What stays beside the layers."""

    fusable: bool = Field(False, description="whether graph and cost are the base's: never, with a product beside")
    files: tuple[str, ...] = Field((), description="names of the files whose matrices are inside")


class AdaptersAsInputs(Pass):
    """Put a low-rank product beside layers whose matrices, or whose strength alone, are given with each call."""

    intends: ClassVar[str] = "the original with the adapters that a call brings"
    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (ONE_NETWORK,)
    looks_for: ClassVar[str] = "linear layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (AdaptedByInputs, AdaptedByStrength)
    facts: ClassVar[type[Facts]] = SidePathFacts

    layers: tuple[str, ...] = Field(
        default=(), description="glob patterns of layers that take adapters; empty: those that the files adapt"
    )
    files: tuple[str, ...] = Field(default=(), description="safetensors files with adapters that calls will bring")
    rank: int | None = Field(
        default=None, ge=1, description="largest rank of an adapter; left out: the largest that a file has"
    )
    inputs: Literal["matrices", "strength"] = Field(
        default="matrices", description="what of an adapter is an input; with strength the files' matrices stay inside"
    )
    alpha: float | None = Field(
        default=None, gt=0, description="lora_alpha, where neither a file nor adapter_config.json beside it says"
    )
    partly: bool = Field(default=False, description="go on when keys of a file match nothing; they are listed")

    def moved(self, path: Callable[[str], str], model: Callable[[str], str]) -> Self:
        """This pass as a recipe in another folder names its files and models."""
        del model
        return self.model_copy(update={"files": tuple(map(path, self.files))})

    def refuse_incomplete(self) -> None:
        """Raise ``ToolchainError`` where nothing says which layers, or which rank."""
        if self.inputs == "strength":
            if not self.files or self.layers or self.rank:
                raise ToolchainError(
                    f"{self.name()} with inputs = 'strength' takes files, and neither layers nor rank",
                    help="the files say which layers they adapt, and at which rank",
                )
        elif not self.files and not (self.layers and self.rank):
            raise ToolchainError(
                f"{self.name()} needs layers and rank, or files that say both",
                help="such as files = ['lora.safetensors'], or layers = ['*.to_q', '*.to_v'] and rank = 16",
            )

    def plan(self, model: nn.Module, context: Context) -> Plan[AdaptedByInputs | AdaptedByStrength]:
        """Choose layers and where their matrices lie.

        Raises ``ToolchainError`` for a pattern that matches no layer, and for a file that is not there, of another kind
        than LoRA, or with entries that match nothing (unless ``partly``).
        """
        self.refuse_incomplete()
        found, others = adaptable(model)
        check_patterns(self.layers, [*found, *others], what="layer", setting="layers")
        files = [read_adapters(name, context.folder, of=network_config(model), alpha=self.alpha) for name in self.files]
        placed = [self.placed(file, found, others) for file in files]
        adapted = {path for each in placed for path in each}
        wanted = [path for path in found if self.takes(path, adapted)]
        not_asked = "no pattern of layers matches it" if self.layers else "no file adapts it"
        skipped = others | {path: not_asked for path in found if path not in wanted}
        if context.example is not None:
            run = macs_by_module(model, context.example)
            skipped |= {path: "no call runs it as a layer" for path in wanted if not run.get(path)}
        widths = {path: found[path] for path in wanted if path not in skipped}
        if self.inputs == "matrices":
            rank = self.rank or max(adapter.rank for each in placed for adapter in each.values())
            refuse_larger(placed, files, rank)
            return self.with_cost(
                model, Plan(choice=stacked(widths, rank), skipped=skipped, facts=SidePathFacts()), context
            )
        return self.with_cost(model, merged(widths, placed, files, skipped), context)

    def takes(self, path: str, adapted: set[str]) -> bool:
        """Whether a layer is asked for."""
        if not self.layers:
            return path in adapted
        return any(fnmatchcase(path, pattern) for pattern in self.layers)

    def placed(self, file: AdapterFile, found: Mapping[str, Widths], others: Mapping[str, str]) -> dict[str, Adapter]:
        """A file's adapters by module path, all of them products of two matrices that fit."""
        adapters, strange = file.placed(named_by_files([*found, *others]))
        for path, adapter in adapters.items():
            if path in others:
                raise ToolchainError(f"{file.name!r} adapts {others[path]}", where=path)
            refuse_unlike(file, path, adapter, found[path])
        file.refuse_unmatched(adapters, strange, partly=self.partly)
        return adapters

    def with_cost(self, model: nn.Module, plan: Plan, context: Context) -> Plan:
        """The same plan, which says in words what the side paths cost."""
        if not plan.choice:
            return plan
        what = "are inputs" if self.inputs == "matrices" else "have their strength as an input"
        said = f"the adapters of {len(plan.choice)} layers {what}, which is not fusable"
        if context.example is not None:
            before, after = macs(model, context.example), macs(self.rewrite(share(model), plan), context.example)
            percent = 100 * (after - before) / max(before, 1)
            said = f"{said}: they add {after - before:,} multiply-accumulates to a call ({percent:.3g} %)"
        return replace(plan, facts=plan.facts.model_copy(update={"fusable": False, "notes": (said,)}))

    def rewrite(self, model: nn.Module, plan: Plan[AdaptedByInputs | AdaptedByStrength]) -> nn.Module:
        """Put side paths around the layers, in place: a layer lies at ``PATH.base`` then."""
        return with_side_paths(model, plan, [each.name for each in self.new_inputs(plan)])

    def new_inputs(self, plan: Plan[AdaptedByInputs | AdaptedByStrength]) -> tuple[NewInput, ...]:
        """Matrices, zeros where a caller leaves them out; or strengths, 1 where they are left out."""
        by_inputs = [each for each in plan.choice.values() if isinstance(each, AdaptedByInputs)]
        if len(by_inputs) == len(plan.choice):
            return tuple(inputs_of(by_inputs))
        files = len(next(each.ranks for each in plan.choice.values() if isinstance(each, AdaptedByStrength)))
        return (NewInput(name=STRENGTH, shape=(files,), default=1.0, role="strength", shared=True, range=(0, 1)),)

    def intended(self, model: nn.Module, plan: Plan, context: Context) -> nn.Module:
        """The original with the same adapters, the two matrices of each multiplied first.

        Raises ``ToolchainError`` where a step before has made another layer of one, for which no adapter was trained.
        """
        found, _ = adaptable(model)
        for path, decision in plan.choice.items():
            if path in found and isinstance(decision, AdaptedByInputs):
                if found[path] == Widths(decision.reads, decision.writes):
                    continue
            elif path in found and plan.array(f"{path}.down").shape[1] == found[path].inputs:
                continue
            raise ToolchainError(
                "a step before has cut or replaced this layer, and adapters are for the original's",
                where=path,
                help=f"take {self.name()} first, or leave the layer out",
            )
        return with_side_paths(share(model), plan, [each.name for each in self.new_inputs(plan)], product_first=True)

    def arrays_of(self, file: AdapterFile, plan: Plan, *, scale: float = 1.0) -> dict[str, Tensor]:
        """The inputs that bring a file's adapter, float32, by name.

        Args:
            file: with the adapter.
            plan: that the network was made by.
            scale: multiplies the adapter's product.

        Raises:
            ToolchainError: its rank is larger than the network's, it is of another kind than LoRA, or entries match no
                layer that takes adapters (unless ``partly``).
        """
        choice: dict[str, AdaptedByInputs] = dict(plan.choice)
        adapters, strange = file.placed(named_by_files(choice))
        file.refuse_unmatched(adapters, strange, partly=self.partly)
        found = {each.name: torch.zeros(each.shape) for each in self.new_inputs(plan)}
        for path, adapter in adapters.items():
            to = choice[path]
            refuse_unlike(file, path, adapter, Widths(to.reads, to.writes))
            refuse_larger([{path: adapter}], [file], to.rank)
            down, up = matrices_of(file, path, adapter)
            found[down_name(to)][to.down, : adapter.rank] = down
            found[up_name(to)][to.up, :, : adapter.rank] = scale * up
        return found


def with_side_paths(model: nn.Module, plan: Plan, names: Sequence[str], *, product_first: bool = False) -> nn.Module:
    """Put side paths around the layers of a plan, in place, and let each network take what its own need."""
    if not plan.choice:
        return model
    call = OngoingCall()
    program, added = program_of(model), {}
    for name in networks_of(model):
        read = {each for own in local(plan.choice, place_of(model, name)).values() for each in names_read(own)}
        added[name] = given_beside(program, name, names, read)

    def take(network: nn.Module, name: str) -> nn.Module:
        wrap(network, TakingAdapters(call, tuple(added[name])))
        return network

    model = called_by(each_network(model, take), taking(program, added))
    for path, decision in plan.choice.items():
        base = model.get_submodule(path)
        around = side_path(base, call, path, decision, plan, product_first=product_first)
        put_at(model, path, around.train(base.training))
    return model


def side_path(
    base: nn.Module, call: OngoingCall, path: str, decision: Decision, plan: Plan, *, product_first: bool
) -> SidePath:
    """What comes around one layer."""
    if isinstance(decision, AdaptedByInputs):
        return GivenMatrices(
            base,
            call,
            Widths(decision.reads, decision.writes),
            down=Entry(down_name(decision), decision.down),
            up=Entry(up_name(decision), decision.up),
            rank=decision.rank,
            product_first=product_first,
        )
    assert isinstance(decision, AdaptedByStrength)
    down, up = plan.array(f"{path}.down"), plan.array(f"{path}.up")
    return GivenStrength(
        base,
        call,
        Widths(down.shape[1], up.shape[0]),
        down=down,
        up=up,
        ranks=decision.ranks,
        name=STRENGTH,
        product_first=product_first,
    )


def names_read(decision: Decision) -> tuple[str, ...]:
    """The inputs that an adapted layer reads."""
    if isinstance(decision, AdaptedByInputs):
        return down_name(decision), up_name(decision)
    return (STRENGTH,)


def down_name(decision: AdaptedByInputs) -> str:
    """The input that holds a layer's A."""
    return f"adapter_down_{decision.reads}"


def up_name(decision: AdaptedByInputs) -> str:
    """The input that holds a layer's B."""
    return f"adapter_up_{decision.writes}"


def stacked(widths: Mapping[str, Widths], rank: int) -> dict[str, AdaptedByInputs]:
    """Where the matrices of each layer lie, in the model's order."""
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    choice = {}
    for path, each in widths.items():
        down, up = reads.get(each.inputs, 0), writes.get(each.outputs, 0)
        choice[path] = AdaptedByInputs(rank=rank, reads=each.inputs, writes=each.outputs, down=down, up=up)
        reads[each.inputs], writes[each.outputs] = down + 1, up + 1
    return choice


def inputs_of(choice: Sequence[AdaptedByInputs]) -> Iterator[NewInput]:
    """The inputs of all matrices; their ranges are such that drawn adapters add ``TRIED`` to a layer's output."""
    for width in sorted({each.reads for each in choice}):
        of = [each for each in choice if each.reads == width]
        bound = math.sqrt(3 / width)
        yield NewInput(
            name=down_name(of[0]),
            shape=(len(of), of[0].rank, width),
            role="adapter",
            shared=True,
            range=(-bound, bound),
        )
    for width in sorted({each.writes for each in choice}):
        of = [each for each in choice if each.writes == width]
        bound = TRIED * math.sqrt(3 / of[0].rank)
        yield NewInput(
            name=up_name(of[0]), shape=(len(of), width, of[0].rank), role="adapter", shared=True, range=(-bound, bound)
        )


def merged(
    widths: Mapping[str, Widths],
    placed: Sequence[Mapping[str, Adapter]],
    files: Sequence[AdapterFile],
    skipped: Mapping[str, str],
) -> Plan[AdaptedByStrength]:
    """The adapters of all files, each layer's in one pair of matrices."""
    choice = {}
    arrays = {}
    for path in widths:
        pairs = [matrices_of(file, path, each[path]) for file, each in zip(files, placed, strict=True) if path in each]
        choice[path] = AdaptedByStrength(ranks=tuple(each[path].rank if path in each else 0 for each in placed))
        arrays[f"{path}.down"] = torch.cat([down for down, _ in pairs])
        arrays[f"{path}.up"] = torch.cat([up for _, up in pairs], dim=1)
    return Plan(
        choice=choice, skipped=skipped, facts=SidePathFacts(files=tuple(file.name for file in files)), arrays=arrays
    )


def matrices_of(file: AdapterFile, path: str, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A (r, D_in) and B (D_out, r) times alpha / r, float32; the product is made in double precision."""
    factor = file.factor(path.removeprefix("inner."), adapter)
    down, up = (adapter.parts[name].detach().flatten(1) for name in ("down", "up"))
    return down.float().contiguous(), (factor * up.double()).float().contiguous()


def refuse_unlike(file: AdapterFile, path: str, adapter: Adapter, widths: Widths) -> None:
    """Raise ``ToolchainError`` for an adapter that is no product of two matrices, or not of the layer's sizes."""
    kind = file.kind_of(path, adapter)
    if kind != "lora" or "bias" in adapter.parts:
        what = f"a {kind}" if kind != "lora" else "an adapter with a bias"
        raise ToolchainError(
            f"{file.name!r} holds {what}, which is no product of two matrices beside the layer",
            where=path,
            help="fold_adapters merges it into the weights",
        )
    down, up = adapter.parts["down"], adapter.parts["up"]
    rank = down.shape[0]
    if down.numel() != rank * widths.inputs or tuple(up.shape[:2]) != (widths.outputs, rank) or up[0, 0].numel() != 1:
        raise ToolchainError(
            f"the adapter's down {tuple(down.shape)}, up {tuple(up.shape)} do not fit a layer from {widths.inputs} to "
            f"{widths.outputs} features",
            where=path,
        )


def refuse_larger(placed: Sequence[Mapping[str, Adapter]], files: Sequence[AdapterFile], rank: int) -> None:
    """Raise ``ToolchainError`` for an adapter of a larger rank than the network has room for."""
    for file, adapters in zip(files, placed, strict=True):
        for path, adapter in adapters.items():
            if adapter.rank > rank:
                raise ToolchainError(
                    f"{file.name!r} has rank {adapter.rank}, and there is room for {rank}",
                    where=path,
                    help=f"export again with rank = {adapter.rank}",
                )
