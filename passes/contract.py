"""What a pass is: it decides (``plan``), then carries out (``rewrite``), and says what changed and what did not.

What a plan is stands in ``plans.py``; passes import both from here.

A pass is one file under ``passes/<family>/`` with one subclass of ``Pass``; the file's name is the pass's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from enginewright.ground.driver import in_groups
from enginewright.ground.errors import ToolchainError, invalid, raise_faults
from enginewright.ground.facts import Fact
from enginewright.ground.program import Hoisted
from enginewright.ground.signature import Role, Signature, in_multiples
from enginewright.passes.kernel.graph_module import GraphModule, is_parameter, weights_of
from enginewright.passes.kernel.on_shapes import on_shapes
from enginewright.passes.kernel.plain import plain
from enginewright.passes.kernel.surgery import follow, several_names
from enginewright.passes.networks import given_to, networks_of, program_of
from enginewright.passes.plans import AnyFacts as AnyFacts
from enginewright.passes.plans import Curve as Curve
from enginewright.passes.plans import Decision as Decision
from enginewright.passes.plans import Declared as Declared
from enginewright.passes.plans import Facts as Facts
from enginewright.passes.plans import Json as Json
from enginewright.passes.plans import Part as Part
from enginewright.passes.plans import Plan as Plan
from enginewright.passes.plans import TokenMap as TokenMap
from enginewright.passes.plans import as_json as as_json
from enginewright.passes.plans import digest_of as digest_of

Inputs = dict[str, Tensor]
Score = Callable[[nn.Module], float]
Losses = Callable[[nn.Module], Tensor]


def no_teacher(text: str) -> nn.Module:
    """Refuse: teachers are loaded by the pipeline."""
    raise ToolchainError(f"teacher {text!r} cannot be loaded here")


def no_calls(text: str) -> list[Inputs]:
    """Refuse: files are read by a model's input contract, which is not known here."""
    raise ToolchainError(f"calls of {text!r} cannot be read here")


def no_score(text: str) -> Score:
    """Refuse: scores are made from a model's source, which is not known here."""
    raise ToolchainError(f"there is no score {text!r} here")


def no_losses(text: str) -> Losses:
    """Refuse, as ``no_score`` does."""
    raise ToolchainError(f"there are no losses {text!r} here")


NOTHING_KNOWN = Signature()
"""Of a model whose inputs nobody declared."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may look at while it plans.

    Args:
        calibration: named inputs of the model, held apart from those that validate it.
        example: the call that costs are counted on; None counts no multiply-accumulates.
        seed: for any random choice.
        original: the untouched model, for passes that compare with it or learn from it.
        score_of: what a parameter ``score`` names, as a function of a model; higher is better.
        losses_of: what a parameter ``losses`` names, as a function of a model: a loss for each sample, (B,).
        say: called with (done, total, text) for progress.
        offload: called with each layer that was rewritten; may move its new tensors to disk.
        draw: (count, seed) -> new calls like those of calibration, which meet neither them nor validation's; None
            where the model's source cannot make any.
        calls_in: the calls of a safetensors file with an array for each input.
        teacher_of: the model that a model string names.
        folder: where relative paths start.
        signature: the inputs that the model takes, as far as that is known: their roles, ranges and rows.
    """

    calibration: Sequence[Inputs] = ()
    example: Inputs | None = None
    seed: int = 0
    original: nn.Module | None = None
    score_of: Callable[[str], Score] = lambda text: no_score(text)
    losses_of: Callable[[str], Losses] = lambda text: no_losses(text)
    say: Callable[[int, int, str], None] = lambda done, total, text: None
    offload: Callable[[nn.Module], None] = lambda layer: None
    draw: Callable[[int, int], list[Inputs]] | None = None
    calls_in: Callable[[str], list[Inputs]] = lambda text: no_calls(text)
    teacher_of: Callable[[str], nn.Module] = lambda text: no_teacher(text)
    folder: Path = Path()
    signature: Signature = NOTHING_KNOWN


def without(context: Context, names: Sequence[str]) -> Context:
    """The same context for a model that lacks these inputs."""
    if not names:
        return context

    def narrowed(calls: Sequence[Inputs]) -> list[Inputs]:
        return [{name: tensor for name, tensor in call.items() if name not in names} for call in calls]

    draw, calls_in = context.draw, context.calls_in
    return replace(
        context,
        calibration=narrowed(context.calibration),
        example=context.example and narrowed([context.example])[0],
        draw=draw and (lambda count, seed: narrowed(draw(count, seed))),
        calls_in=lambda text: narrowed(calls_in(text)),
        signature=context.signature.without(names),
    )


def in_rows(context: Context, together: int) -> Context:
    """The same context for a model whose rows belong together, so many of them: each call has a multiple of those."""
    if together == 1:
        return context

    def grouped(calls: Sequence[Inputs]) -> list[Inputs]:
        return in_groups(calls, shared_by_calls(context.signature, calls), together, lambda parts: torch.cat([*parts]))

    draw, calls_in = context.draw, context.calls_in
    return replace(
        context,
        calibration=grouped(context.calibration),
        example=context.example and grouped([context.example])[0],
        draw=draw and (lambda count, seed: grouped(draw(count, seed))),
        calls_in=lambda text: grouped(calls_in(text)),
        signature=Signature(in_multiples(context.signature.inputs, together)),
    )


def shared_by_calls(signature: Signature, calls: Sequence[Inputs]) -> tuple[str, ...]:
    """Inputs that all rows of a call share; where nobody declared any, those with other rows than the first has."""
    if signature.inputs or not calls:
        return signature.shared
    rows = next(iter(calls[0].values())).shape[:1]
    return tuple(name for name, value in calls[0].items() if value.shape[:1] != rows)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, multiply-accumulates of one call on the example inputs (None: not measured), bytes of weights."""

    parameter_count: int
    macs: int | None
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a pass did: the model, its plan, the module paths it changed, and costs around it."""

    model: nn.Module
    plan: Plan
    changed: tuple[str, ...]
    before: Cost
    after: Cost


@dataclass(frozen=True, kw_only=True)
class NewInput:
    """An input that a rewritten model takes beside those of the original, as a keyword.

    Args:
        name: of the argument.
        shape: of one row, or of the whole where all rows share it.
        dtype: numpy's name of the element type.
        default: every element, where a caller leaves the input out.
        role: what it is for; where nobody says, its name does.
        shared: whether it has no row for each row of the batch.
        range: of the values that engines are compared at; what the pass intends takes the input then. None: they are
            compared at the default.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    default: float = 0.0
    role: Role = "unknown"
    shared: bool = False
    range: tuple[float, float] | None = None


SCORE_HELP = (
    "score = 'FILE.py:FUNCTION' names a function of yours, def FUNCTION(module) -> float, higher is better; it calls "
    "the module on your data and counts what is right. Models with a sampling task also know metrics of samples "
    "(enginewright list metrics)"
)
"""How to give a score."""

WORDS = {"module": "PyTorch modules", "graph": "ONNX graphs"}
"""What a pass works on, in words."""


class Pass(BaseModel, ABC):
    """One optimization. Parameters are pydantic fields with defaults, ranges and descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    works_on: ClassVar[Literal["module", "graph"]] = "module"
    """PyTorch modules, or ONNX graphs: ``plan`` and ``rewrite`` are then handed a ``GraphModule``."""
    needs_calibration: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True
    """Whether rewriting one layer of the plan after the other gives what rewriting all at once gives."""
    requires: ClassVar[tuple[Fact, ...]] = ()
    """Facts that must hold of a model before this pass; a recipe in which they do not is refused before any work."""
    establishes: ClassVar[tuple[Fact, ...]] = ()
    """Facts that hold after it."""
    destroys: ClassVar[tuple[Fact, ...]] = ()
    """Facts that hold no more after it."""
    intends: ClassVar[str] = ""
    """What this pass means a model to compute that it did not compute before, in words that finish "it intends".

    Empty for a pass that approximates: that is held against what was intended before it, and never against itself."""
    looks_for: ClassVar[str] = "layers that it could change"
    """What the pass looks for in a model, in the plural: said where a model has none of them."""
    functions: ClassVar[tuple[str, ...]] = ()
    """Parameters that may name a function of the user's, ``FILE.py:FUNCTION``."""
    decisions: ClassVar[tuple[type[Decision], ...]] = ()
    """Kinds of decision that its plans hold; without any, a decision is a table that nothing checks."""
    facts: ClassVar[type[Facts]] = AnyFacts
    """What its decisions rest on, or have in common; as it stands here, a table that nothing checks."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Number formats that a graph holds after this pass, as targets name them; empty: floats as they were."""
        return ()

    def __init__(self, **parameters: Any) -> None:
        """Raises ``ToolchainError`` for an unknown parameter or one out of its range."""
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            raise_faults(invalid(error, what=self.name(), model=type(self)))

    @classmethod
    def name(cls) -> str:
        """The file's name."""
        return cls.__module__.rpartition(".")[2]

    def moved(self, path: Callable[[str], str], model: Callable[[str], str]) -> Self:
        """The same pass for a recipe in another folder: its paths and model strings, where it has any, changed."""
        del model
        found = {name: moved_function(getattr(self, name), path) for name in self.functions}
        return self.model_copy(update=found) if found else self

    def refuse_incomplete(self) -> None:
        """Raise ``ToolchainError`` where settings that no default could fit are missing; asked before any work."""

    @property
    def declared(self) -> Declared:
        """What is asked of its plans."""
        # Grows by one whenever any of the kinds does.
        version = self.facts.version + sum(kind.version - 1 for kind in self.decisions)
        return Declared(name=self.name(), kinds=self.decisions, version=version, facts=self.facts)

    @abstractmethod
    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Decide; changes nothing."""

    @abstractmethod
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Carry the plan out, in place where that is natural; deterministic, needs no data."""

    def new_inputs(self, plan: Plan) -> tuple[NewInput, ...]:
        """What the rewritten model takes beside the original's inputs; each may be left out of a call in PyTorch."""
        return ()

    def removed_inputs(self, plan: Plan) -> tuple[str, ...]:
        """Inputs of the original that the rewritten model takes no more."""
        return ()

    def rows_together(self, plan: Plan) -> int:
        """How many rows of a call belong together after this pass: every call has a multiple of them."""
        return 1

    def intended(self, model: nn.Module, plan: Plan, context: Context) -> nn.Module:
        """What is meant to be computed after this pass, in exact form, given what was meant before it.

        Asked only of a pass that says what it ``intends``. ``model`` is not changed.
        """
        return model

    def apply(self, model: nn.Module, context: Context) -> Result:
        """Plan, rewrite and account for it."""
        if isinstance(model, GraphModule) != (self.works_on == "graph"):
            raise ToolchainError(f"{self.name()} works on {WORDS[self.works_on]}, and was handed another model")
        if self.needs_calibration and not context.calibration:
            raise ToolchainError(f"{self.name()} needs calibration inputs and got none")
        self.refuse_incomplete()
        model = plain(model)
        plan = self.with_reason(model, self.planned(model, context))
        context = in_rows(context, self.rows_together(plan))
        before = cost(model, context.example)
        model = self.carry_out(model, plan, context)
        example = without(context, self.removed_inputs(plan)).example
        return Result(model=model, plan=plan, changed=tuple(plan.choice), before=before, after=cost(model, example))

    def planned(self, model: nn.Module, context: Context) -> Plan:
        """The plan, held against what this pass declares. Raises ``ToolchainError`` for what it does not declare."""
        return self.declared.checked(self.plan(model, context))

    def with_reason(self, model: nn.Module, plan: Plan) -> Plan:
        """The plan; one that names nothing says what was looked for, and what there is instead."""
        if plan.choice or plan.skipped:
            return plan
        reason = f"it has no {self.looks_for}{there_is(model)}"
        notes = (*plan.facts.notes, f"{self.name()} changed nothing: {reason}")
        return replace(plan, skipped={"": reason}, facts=plan.facts.model_copy(update={"notes": notes}))

    def check_calibration(self, context: Context, asked: str, *, otherwise: str) -> None:
        """Raise ``ToolchainError`` where a setting (``asked``, in words) has no calibration inputs to work with."""
        if not context.calibration:
            raise ToolchainError(
                f"{self.name()} with {asked} needs calibration inputs and got none",
                help=f"give calibration inputs, or {otherwise}",
            )

    def carry_out(self, model: nn.Module, plan: Plan, context: Context) -> nn.Module:
        """Rewrite layer by layer where that is the same, so that new tensors can leave memory as they come.

        A layer that the model holds under several names is planned under the first; the others follow it.
        """
        if self.works_on == "graph":
            return self.rewrite(model, plan)
        model = plain(model)
        places = several_names(model)
        olds = {path: old for path in plan.choice if (old := module_at(model, path)) is not None and id(old) in places}
        parts = [replace(plan, choice={path: plan.choice[path]}) for path in plan.choice] if self.by_layer else [plan]
        for part in parts:
            model = self.rewrite(model, part)
            for path in part.choice:
                if path in olds and (new := module_at(model, path)) is not None:
                    follow(olds[path], new, places[id(olds[path])])
                if self.by_layer:
                    context.offload(model.get_submodule(path))
        return model


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path of a plan, if it names one."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def moved_function(text: str, path: Callable[[str], str]) -> str:
    """``FILE.py:FUNCTION`` with the file's path changed; any other text as it is."""
    file, _, name = text.rpartition(":")
    return f"{path(file)}:{name}" if file.endswith(".py") else text


def there_is(model: nn.Module) -> str:
    """What kinds of layers a model is made of, for a pass that found none of its own."""
    if isinstance(model, GraphModule):
        return ""
    weighted = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    kinds = list(dict.fromkeys(type(module).__name__ for module in weighted))
    if not kinds:
        return "; none of its modules has weights"
    return f"; its weights are in {', '.join(kinds[:8])}{', …' if len(kinds) > 8 else ''}"


def cost(model: nn.Module, example: Inputs | None) -> Cost:
    """Count parameters, weight bytes and, given an example call, multiply-accumulates.

    Matrices of 8-bit numbers held as buffers named ``weight`` (a quantized layer's) count as parameters; other buffers,
    such as masks, do not. Of an ONNX
    graph its float tensors and int8 matrices count, and no multiply-accumulates. Weights of a module that says
    ``weight_bits`` count as the bits that they have in a file.
    """
    if isinstance(model, GraphModule):
        return graph_cost(model)
    bits: dict[int, Any] = {
        id(part.weight): part.weight_bits for part in model.modules() if hasattr(part, "weight_bits")
    }
    held = [buffer for name, buffer in model.named_buffers() if is_weight(name, buffer)]
    weights = [*model.parameters(), *held]
    return Cost(
        parameter_count=sum(t.numel() for t in weights),
        macs=None if example is None else macs(model, example),
        bytes=sum(
            t.numel() * bits.get(id(t), 8 * t.element_size()) // 8 for t in (*model.parameters(), *model.buffers())
        ),
    )


def is_weight(name: str, buffer: Tensor) -> bool:
    """Whether a buffer holds the weights of a quantized layer."""
    return name.rpartition(".")[2] == "weight" and buffer.dtype.itemsize == 1 and buffer.ndim > 1


def graph_cost(model: GraphModule) -> Cost:
    """Parameters and bytes of a graph's initializers."""
    weights = {value: value.const_value for value in weights_of(model.graph) if value.const_value is not None}
    learned = sum(tensor.size for value, tensor in weights.items() if is_parameter(value))
    return Cost(parameter_count=learned, macs=None, bytes=sum(tensor.nbytes for tensor in weights.values()))


def macs(model: nn.Module, example: Inputs) -> int:
    """Multiply-accumulates of the matrix products, convolutions and attention in one call.

    Counted on shapes alone where the model allows that, so that its weights are not read. Of networks by timestep, the
    mean over the schedule; of what a run does once, none.
    """
    program = program_of(model)
    each = {
        name: macs_in_step(network, shapes_given_to(model, name, example), program.hoisted.get(name))
        for name, network in networks_of(model).items()
    }
    ways = [sum(each[call.network] for call in way.calls) for way in program.ways]
    table = program.table.ways if program.table else (0,)
    return round(sum(ways[way] for way in table) / len(table))


def shapes_given_to(model: nn.Module, name: str, example: Inputs) -> Inputs:
    """What a call gives to one of a model's networks, its values made up where shapes do not depend on them."""
    try:
        return given_to(model, name, example, shapes_alone=True)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        return given_to(model, name, example)


def macs_in_step(network: nn.Module, example: Inputs, once: Hoisted | None) -> int:
    """The same of one network, without what of it is done once for a run."""
    if once is None:
        return counted(network, example).get_total_flops() // 2
    by_module = macs_by_module(network, example)
    return by_module.get("", 0) - sum(by_module.get(path, 0) for path in once.modules)


def macs_of_shapes(model: nn.Module, example: Inputs) -> int | None:
    """The same, without a weight read; None for a model whose shapes depend on what its tensors hold."""
    counter = counted_on_shapes(model, example)
    return None if counter is None else counter.get_total_flops() // 2


def macs_by_module(model: nn.Module, example: Inputs) -> dict[str, int]:
    """Multiply-accumulates of one call within each module, by path; none for a module that is not called."""
    counts = counted(model, example).get_flop_counts()
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(by_operation.values()) // 2
        for name, by_operation in counts.items()
        if name.startswith(root)
    }


def counted(model: nn.Module, example: Inputs) -> FlopCounterMode:
    """A counter that has seen one call, on shapes where that is possible."""
    return counted_on_shapes(model, example) or called(model, example)


def counted_on_shapes(model: nn.Module, example: Inputs) -> FlopCounterMode | None:
    """A counter that has seen one call on shapes alone; None where shapes depend on what tensors hold."""
    try:
        with on_shapes(model):
            return called(model, example)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        return None


def called(model: nn.Module, example: Inputs) -> FlopCounterMode:
    """A counter that has seen one call, which is made."""
    counter = FlopCounterMode(display=False)
    # The plain form of attention, because the counter does not know the fused one for CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**example)
    return counter
