"""Compute in fp16 or bf16, but for the layers where that would overflow or lose too much; those are found by running.

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3 (keep what needs range or accuracy in fp32). Here no layer
is kept by its kind: each is run on what it met in calibration, in both types.

Weights are converted where they lie, running statistics of a norm with them; every layer that owns weights takes its
input in its own type, and what is between layers follows its operands. Other buffers (tables of frequencies) keep their
type. The converted model is run in true half precision, operator by operator: what overflows between two layers, though
no layer shows it, has the layers that it reads from in fp32 too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, FULL_PRECISION, Fact
from enginewright.passes.contract import Context, Decision, Facts, Inputs, Part, Pass, Plan
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.distance import relative_l2
from enginewright.passes.kernel.observe import Look, calls_of, evaluating, floats_in, looking, observe, tensors_in
from enginewright.passes.kernel.selection import check_patterns, excluded_by, is_within
from enginewright.passes.kernel.surgery import share
from enginewright.passes.networks import networks_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

ROUNDS = 12
"""How often layers are given back to fp32 before the pass gives up."""


class ConvertedLayer(Decision):
    """The type that a layer computes in."""

    dtype: Literal["float16", "bfloat16"] = Field(description="of its weights, and what it takes as input")


class KeptLayer(Part):
    """A layer that stays in fp32."""

    wide: bool = Field(description="whether what it puts out stays in fp32 as well")


class ConvertedFacts(Facts):
    """What stays in fp32 around the converted layers."""

    kept: dict[str, KeptLayer] = Field(description="layers that stay, by path")
    constants: tuple[str, ...] = Field((), description="modules whose own constants are converted too")
    error: float | None = Field(None, description="of the converted model, on the calibration inputs")
    alone: bool = Field(False, description="whether other layers are of other types, so that each takes and gives fp32")


class ConvertDtype(Pass):
    """Convert weights and computation to 16 bits, with a list of layers that stay in fp32."""

    needs_calibration: ClassVar[bool] = True
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, FULL_PRECISION)
    destroys: ClassVar[tuple[Fact, ...]] = (FULL_PRECISION,)
    looks_for: ClassVar[str] = "weights in fp32"
    decisions: ClassVar[tuple[type[Decision], ...]] = (ConvertedLayer,)
    facts: ClassVar[type[Facts]] = ConvertedFacts

    dtype: Literal["float16", "bfloat16"] = Field("float16", description="floating type to compute in")
    headroom: float = Field(2, ge=1, description="a layer stays in fp32 when its values times this would overflow")
    tolerance: float = Field(0.02, gt=0, description="and when its relative L2 error on its own would be above this")
    max_error: float = Field(
        0.1, gt=0, description="largest relative L2 error of the outputs in true half precision; above it, more stays"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of module paths that stay in fp32")

    def plan(self, model: nn.Module, context: Context) -> Plan[ConvertedLayer, ConvertedFacts]:
        """Run the calibration inputs through both types of every layer, then through the whole converted model.

        Raises:
            ToolchainError: the converted model gives values that are not finite, or further off than ``max_error``,
                whatever is kept.
        """
        owners = {path: module for path, module in model.named_modules() if own_weights(module)}
        check_patterns(self.exclude, owners, what="layer with floating-point weights")
        seen = watch(model, owners, context, DTYPES[self.dtype])
        draft = Draft(self.dtype, tuple(owners))
        limit = torch.finfo(DTYPES[self.dtype]).max / self.headroom
        for path in owners:
            values = seen.get(path)
            if reason := excluded_by(path, self.exclude):
                draft.kept[path] = reason
            elif values and max(values["input"], values["output"]) > limit:
                draft.kept[path] = f"values of {max(values['input'], values['output']):.3g} would overflow"
                draft.wide[path] = values["output"] > limit
            elif values and values["error"] > self.tolerance:
                draft.kept[path] = f"its relative error would be {values['error']:.2g}"
        own_error = {path: values["error"] for path, values in seen.items()}
        return self.settled(model, draft, own_error, context)

    def settled(
        self, model: nn.Module, draft: Draft, own_error: Mapping[str, float], context: Context
    ) -> Plan[ConvertedLayer, ConvertedFacts]:
        """Give back to fp32 what makes the converted model wrong, until it is right."""
        trial = Trial(0.0, None)
        draft = self.with_constants(model, draft, context)
        draft = self.widened(model, draft, context)
        for _ in range(ROUNDS):
            plan = draft.plan()
            trial = self.tried(model, plan, context)
            if trial.faulty is None and trial.error <= self.max_error:
                return replace(plan, facts=plan.facts.model_copy(update={"error": six_digits(trial.error)}))
            if trial.faulty is None:
                fresh = worst_of([path for path in draft.owners if path not in draft.kept], own_error)
                said = f"the model's error was {trial.error:.2g} with it, above {self.max_error:g}"
                narrow, draft = draft.keeping(fresh, said, wide=False), draft.keeping(fresh, said, wide=True)
                if self.stops_in(model, draft, context) is not None:
                    draft = narrow
                continue
            near = draft
            for path in trial.sources:
                near = near.keeping([path], f"values that come from within {path} were not finite", wide=True)
            narrower = not all(draft.wide.get(path) for path in trial.sources)
            if narrower and self.stops_in(model, near, context) is None:
                draft = near
            else:
                said = f"values within {trial.faulty or 'the model'} were not finite"
                inside = [path for path in draft.owners if is_within(path, trial.faulty)]
                draft = draft.keeping(inside, said, wide=True)
        what = "not finite" if trial.faulty is not None else f"off by {trial.error:.2g}, more than {self.max_error:g},"
        raise ToolchainError(
            f"in {self.dtype} the model's output is {what} on the calibration inputs",
            where=trial.faulty,
            help="take dtype = 'bfloat16', which has the range of fp32" if self.dtype == "float16" else None,
        )

    def with_constants(self, model: nn.Module, draft: Draft, context: Context) -> Draft:
        """Convert modules' own constants too that meet converted values in an operator which takes one type alone."""
        while (place := self.stops_in(model, draft, context)) is not None:
            if place in draft.constants:  # that was not the reason
                return replace(draft, constants=draft.constants - {place})
            if not constants(model.get_submodule(place)):
                break
            draft = replace(draft, constants=draft.constants | {place})
        return draft

    def widened(self, model: nn.Module, draft: Draft, context: Context) -> Draft:
        """Keep the neighbours of layers whose outputs stay in fp32 as well, until no operator meets two types."""
        around = {path for path, stays in draft.wide.items() if stays}
        while around - {""} and self.stops_in(model, draft, context) is not None:
            around = {path.rpartition(".")[0] for path in around}
            inside = [path for path in draft.owners if any(is_within(path, place) for place in around)]
            draft = draft.keeping(inside, "it works together with a layer whose values would overflow", wide=True)
        return draft

    def stops_in(self, model: nn.Module, draft: Draft, context: Context) -> str | None:
        """The module in which the converted model stops, because an operator meets two types; None: it runs."""
        converted = self.rewrite(share(model), draft.plan())
        inside: list[str] = []
        looks = [
            Look(module, before=partial(entered, inside, path), after=partial(left, inside))
            for path, module in converted.named_modules()
        ]
        try:
            with torch.no_grad(), evaluating(converted), looking(looks):
                converted(**context.calibration[0])
        except RuntimeError:
            return inside[-1]
        return None

    def tried(self, model: nn.Module, plan: Plan[ConvertedLayer, ConvertedFacts], context: Context) -> Trial:
        """Run the converted model in true half precision, and the original beside it, on the calibration inputs."""
        converted = self.rewrite(share(model), plan)
        owners = {*plan.choice, *plan.facts.kept}
        worst = 0.0
        with torch.no_grad(), evaluating(model), evaluating(converted):
            for inputs in calls_of(context, f"trying {self.dtype}"):
                with OverflowWatch(model, owners) as usual:
                    wanted = vector(model, inputs)
                with OverflowWatch(converted, owners, usual.places) as watch:
                    got = vector(converted, inputs)
                error = relative_l2(wanted, got)
                if watch.faulty is not None or not math.isfinite(error):
                    return Trial(error, watch.faulty or "", watch.sources)
                worst = max(worst, error)
        return Trial(worst, None)

    def rewrite(self, model: nn.Module, plan: Plan[ConvertedLayer, ConvertedFacts]) -> nn.Module:
        """Convert the weights of each planned layer, and have every layer take its input in its own type.

        A plan whose facts say ``alone`` converts some layers among others, each with a cast before and behind it.
        """
        dtype = DTYPES[self.dtype]
        for path in plan.choice:
            module = model.get_submodule(path)
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_floating_point():
                    converted = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                    setattr(module, name, converted)
            for name, statistics in running(module).items():
                module._buffers[name] = statistics.to(dtype)
            take(module)
            if plan.facts.alone:  # among layers of other types: what it gives is what they take
                give(module, torch.float32)
        for path in plan.facts.constants:
            module = model.get_submodule(path)
            module._buffers |= {name: buffer.to(dtype) for name, buffer in constants(module).items()}
        for path, entry in plan.facts.kept.items():
            module = model.get_submodule(path)
            take(module)
            if not entry.wide:
                give(module, dtype)
        if not plan.facts.alone:
            for network in networks_of(model).values():
                give(network, torch.float32)
        return model


@dataclass(frozen=True)
class Draft:
    """Which layers are to be converted.

    Args:
        dtype: to which type.
        owners: paths of all layers with weights of their own.
        kept: those that stay in fp32, and why.
        wide: of those, whether what they put out stays in fp32 as well.
        constants: modules whose own constants are converted too.
    """

    dtype: str
    owners: tuple[str, ...]
    kept: dict[str, str] = field(default_factory=dict)
    wide: dict[str, bool] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()

    def keeping(self, paths: Sequence[str], reason: str, *, wide: bool) -> Draft:
        """The same with more layers in fp32; those that stay in it already keep their reason."""
        kept = self.kept | {path: reason for path in paths if path not in self.kept}
        return replace(self, kept=kept, wide=self.wide | (dict.fromkeys(paths, True) if wide else {}))

    def plan(self) -> Plan[ConvertedLayer, ConvertedFacts]:
        """The plan that converts all but the kept layers."""
        choice = {path: ConvertedLayer(dtype=self.dtype) for path in self.owners if path not in self.kept}
        facts = ConvertedFacts(kept={path: KeptLayer(wide=bool(self.wide.get(path))) for path in self.kept})
        if self.constants:
            facts = facts.model_copy(update={"constants": tuple(sorted(self.constants))})
        return Plan(choice=choice, skipped=dict(self.kept), facts=facts)


@dataclass(frozen=True)
class Trial:
    """How the converted model did.

    Args:
        error: its largest relative error.
        faulty: path of the innermost module where values stopped being finite; None: nowhere.
        sources: paths of the layers that the operator which gave the first of them read from.
    """

    error: float
    faulty: str | None
    sources: tuple[str, ...] = ()


Place = tuple[str, str, int]
"""Where an operator runs: the path of the innermost module, the operator, and its how-manieth call in there."""

aten = torch.ops.aten
UNSEEN = frozenset(
    {
        aten._to_copy.default,
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.empty_strided.default,
    }
)
"""Operators without values of their own, and casts: what a layer takes and gives is looked at by its size."""


class OverflowWatch(TorchDispatchMode):
    """Finds the first operator that makes values which are not finite of finite ones, and the layers it read from.

    Looked at are operators between layers too, whose values no module shows: an infinity that is divided by is a 0.

    Args:
        model: what is run.
        owners: paths of layers; what is read from them is followed.
        usual: places where the model as it was gives such values too, as a mask's; they are no fault.
    """

    def __init__(self, model: nn.Module, owners: Container[str], usual: Container[Place] = ()) -> None:
        super().__init__()
        self.model, self.owners, self.usual = model, owners, usual
        self.places: set[Place] = set()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.faulty: str | None = None
        self.sources: tuple[str, ...] = ()
        self.inside: list[str] = []
        self.origins = WeakTensorKeyDictionary()

    def __enter__(self) -> OverflowWatch:
        """Begin; hooks tell in which module the operators run."""
        self.looks = ExitStack()
        self.looks.enter_context(
            looking(
                Look(module, before=partial(entered, self.inside, path), after=partial(self.leave, path))
                for path, module in self.model.named_modules()
            )
        )
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        """End, and take the hooks away."""
        super().__exit__(*failure)
        self.looks.close()

    def leave(self, path: str, args: Any, kwargs: Any, result: Any) -> None:
        """Note that a module ends, and whose output this is."""
        self.inside.pop()
        if path in self.owners:
            for tensor in floats_in(result):
                self.origins[tensor] = (path,)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        given, got = floats_in([list(args), dict(kwargs or {})]), floats_in(result)
        where = (self.inside or [""])[-1], str(func)
        place = (*where, self.counts[where])
        self.counts[where] += 1
        known = dict.fromkeys(path for tensor in given for path in self.origins.get(tensor, ()))
        for tensor in got:
            if known:
                self.origins[tensor] = tuple(known)
        if got and func not in UNSEEN and not finite(got) and finite(given):
            self.places.add(place)
            if self.faulty is None and place not in self.usual:
                self.faulty, self.sources = where[0], tuple(known)
        return result


def worst_of(paths: Sequence[str], errors: Mapping[str, float]) -> list[str]:
    """The quarter of the layers, at least one, whose own error is largest."""
    ranked = sorted(paths, key=lambda path: -errors.get(path, 0.0))
    return ranked[: max(1, len(ranked) // 4)] if ranked else []


def own_weights(module: nn.Module) -> bool:
    """Whether a module owns fp32 weights, or running statistics, itself."""
    held = [*module.parameters(recurse=False), *running(module).values()]
    return any(tensor.dtype == torch.float32 for tensor in held)


def running(module: nn.Module) -> dict[str, Tensor]:
    """Running statistics of a norm, which its kernels take in the type of its weights only."""
    if not isinstance(module, _NormBase):
        return {}
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()}


def constants(module: nn.Module) -> dict[str, Tensor]:
    """A module's own buffers in fp32."""
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.dtype == torch.float32}


def entered(inside: list[str], path: str, args: Any, kwargs: Any) -> None:
    """Note that a module begins."""
    inside.append(path)


def left(inside: list[str], args: Any, kwargs: Any, result: Any) -> None:
    """Note that the innermost module ends."""
    inside.pop()


def take(module: nn.Module) -> None:
    """Have a layer without children take floating-point inputs in the type of its weights; once."""
    if not list(module.children()) and take_input not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(take_input, with_kwargs=True)


def take_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Convert what a layer is called with to the type of its weights."""
    held = [*module.parameters(recurse=False), *running(module).values()]
    dtype = next(tensor.dtype for tensor in held if tensor.is_floating_point())
    return in_dtype(args, dtype), in_dtype(kwargs, dtype)


def give(module: nn.Module, dtype: torch.dtype) -> None:
    """Have a module give floating-point outputs in this type; once."""
    hook = OUTPUTS[dtype]
    if hook not in module._forward_hooks.values():
        module.register_forward_hook(hook)


def give_output(dtype: torch.dtype, module: nn.Module, args: Any, result: Any) -> Any:
    """Outputs in this type."""
    del module, args
    return in_dtype(result, dtype)


OUTPUTS = {dtype: partial(give_output, dtype) for dtype in (torch.float32, *DTYPES.values())}
"""One hook for each type, so that a module is known to have it."""


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in a value, however nested, in another type; model outputs keep their class."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        converted = {key: in_dtype(part, dtype) for key, part in value.items()}
        return converted if type(value) is dict else type(value)(**converted)
    if type(value) in (tuple, list):
        return type(value)(in_dtype(part, dtype) for part in value)
    return value


def finite(value: Any) -> bool:
    """Whether all floating-point numbers in a value are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in floats_in(value))


def vector(model: nn.Module, inputs: Inputs) -> Tensor:
    """All floating-point outputs of a call, end to end; of a model that gives none, all its outputs."""
    result = model(**inputs)
    return torch.cat([tensor.double().flatten() for tensor in floats_in(result) or tensors_in(result)])


def watch(
    model: nn.Module, owners: Mapping[str, nn.Module], context: Context, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """What each layer meets in calibration: largest input and output, and its own relative error in another type."""
    seen: dict[str, dict[str, float]] = {}

    def look(path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        values = seen.setdefault(path, {"input": 0.0, "output": 0.0, "error": 0.0})
        given, got = floats_in([args, kwargs]), floats_in(result)
        values["input"] = max(values["input"], *(largest(t) for t in given), 0.0)
        values["output"] = max(values["output"], *(largest(t) for t in got), 0.0)
        if not list(module.children()) and got:
            values["error"] = max(values["error"], error_of(module, args, kwargs, got[0], dtype))

    looks = [Look(module, after=partial(look, path, module)) for path, module in owners.items()]
    observe(model, looks, context, doing="calibrating")
    return seen


def largest(tensor: Tensor) -> float:
    """Largest magnitude; 0 of nothing."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def error_of(module: nn.Module, args: Any, kwargs: Any, exact: Tensor, dtype: torch.dtype) -> float:
    """Relative L2 error of a layer computed in another type, on an input of its own; 0 where that is not finite.

    Values that overflow are told by their size; a layer without output has no error.
    """
    weights = {name: p.to(dtype) if p.is_floating_point() else p for name, p in module.named_parameters()}
    weights |= {name: statistics.to(dtype) for name, statistics in running(module).items()}
    twin = share(module)
    twin._forward_hooks.clear()
    result = torch.func.functional_call(twin, weights, in_dtype(args, dtype), in_dtype(kwargs, dtype))
    got = floats_in(result)[0].to(exact.dtype)
    error = relative_l2(exact, got)
    return error if error < float("inf") else 0.0
