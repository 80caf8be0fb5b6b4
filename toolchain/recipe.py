"""A recipe: what to do with a model, from a TOML file or the command line; every fault is found before work starts.

```toml
schema = 1
model = "dit:digits"
gates = ["fidelity.cosine >= 0.999", "onnxruntime: latency.ratio <= 0.8"]

[[steps]]
pass = "quantize_int8"
observer = "max"

[[targets]]
target = "onnxruntime"
optional = true         # this target's absence is no failure
```
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from enginewright import catalog, sources
from enginewright.asking import DTYPES, LARGEST_SEED
from enginewright.ground.errors import FaultsError, ToolchainError, invalid, raise_faults, unknown
from enginewright.ground.facts import Missing, legal_order, missing
from enginewright.ground.reading import read_toml
from enginewright.passes.contract import WORDS, Pass
from enginewright.targets import machine
from enginewright.targets.contract import Target
from enginewright.validation.gates import GateBound, parse
from enginewright.validation.gates import gate_names as gates_of
from enginewright.validation.metrics import load_metrics


class Table(BaseModel):
    """A table of a recipe; unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(Table):
    """Where calibration inputs come from."""

    file: str | None = Field(
        None,
        description="safetensors file, an array per input, or .txt file, a sentence a line; None: made from the model",
    )
    calls: int = Field(16, ge=1, description="calls of the model to calibrate on")


class Export(Table):
    """How the graph is written."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="floating type to compute in; None: as the weights are"
    )
    weights: Literal["auto", "copy", "link"] = Field(
        "auto",
        description="weights that are on disk: copy what is read, as it is; or link the files; auto: copy up to 2 GB",
    )
    embed_weights: bool = Field(
        False, description="write all weights anew into model.safetensors, in the type that is computed in"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def by_short_name(cls, name: Any) -> Any:
        """``fp16`` and the like stand for the whole names."""
        return DTYPES.get(name, name) if isinstance(name, str) else name


class Validation(Table):
    """How engines are compared with the original."""

    skip: bool = Field(False, description="build only")
    calls: int = Field(8, ge=1, description="held-out calls that outputs are compared on")
    samples: int | None = Field(None, ge=1, description="samples drawn in whole runs; None: what the model's task says")
    rounds: int = Field(
        30, ge=3, description="timed calls (samples) of each runner, taken in turns of 3; below 24 a ratio is unsafe"
    )
    warm_up: int = Field(3, ge=1, description="untimed calls of each runner before")
    threads: int | None = Field(None, ge=1, description="CPU threads of each runner; None: every core allowed")
    batch: dict[str, int] = Field({}, description="sizes of dynamic dimensions for timing; default: typical sizes")


class Job(Table):
    """The whole job of a pipeline, run with the engines of its parts and with the original ones."""

    skip: bool = Field(False, description="compare the parts alone")
    prompts: tuple[str, ...] = Field((), description="texts to draw, a run each; none: two of ours")
    steps: int = Field(4, ge=1, description="steps of the sampler in each run")
    arguments: dict[str, Any] = Field(
        {}, description="further arguments of the pipeline's call, such as height, width or guidance_scale"
    )


class Head(Table):
    """A recipe but for its steps and targets."""

    schema_version: Literal[1] = Field(1, alias="schema")
    model: str
    weights: str | None = None
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    trust_remote_code: bool = Field(False, description="run code that a checkpoint folder brings along")
    gates: tuple[str, ...] = ()
    export: Export = Export()
    calibration: Calibration = Calibration()
    validation: Validation = Validation()
    job: Job | None = Field(None, description="of a pipeline: how its parts are tried together")


@dataclass(frozen=True, kw_only=True)
class TargetStep:
    """A target asked for, whether the export may do without it, and what it is called where that is another name."""

    target: Target
    optional: bool = False
    called: str = ""

    @property
    def name(self) -> str:
        """What its engines, figures and gates are told apart by."""
        return self.called or self.target.name()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe, ready to run."""

    head: Head
    steps: tuple[Pass, ...]
    targets: tuple[TargetStep, ...]
    gates: tuple[GateBound, ...]
    folder: Path
    """Relative paths in the recipe start here."""
    notes: tuple[str, ...] = ()
    """What is worth knowing before work starts."""
    only: tuple[tuple[str, ...], ...] = ()
    """For each step the parts of a pipeline that it is for; empty: all of them."""

    def path(self, text: str) -> Path:
        """A path of the recipe."""
        return self.folder / text

    @property
    def threads(self) -> int:
        """Threads of every CPU runner: as many as the recipe says, or every core allowed here."""
        return self.head.validation.threads or threads_here()

    @property
    def model(self) -> str:
        """The model string, its path, if it holds one, from the recipe's folder."""
        return sources.with_path(self.head.model, self.folder, lambda path: str(self.path(path)))

    def part(self, name: str) -> Recipe:
        """The same recipe for one part of a pipeline: its own steps, and gates that are asked of no other part."""
        model = f"{self.head.model}#{name}"
        mine = (gate.of_part(name) for gate in self.gates)
        gates = tuple(gate for gate in mine if gate is not None)
        change = {"model": model, "gates": tuple(str(gate) for gate in gates), "job": None}
        steps = tuple(step for step, parts in zip(self.steps, self.only, strict=True) if not parts or name in parts)
        return replace(
            self, head=self.head.model_copy(update=change), steps=steps, gates=gates, only=((),) * len(steps)
        )

    def refuse_parts(self, parts: Sequence[str]) -> None:
        """Raise where a step or a gate is for a part that a model has not; a model that is no pipeline has none.

        Args:
            parts: of the model.
        """
        steps = [(name, f"steps[{i}].parts") for i, names in enumerate(self.only) for name in names]
        gates = [(gate.part, "gates") for gate in self.gates if gate.part]
        asked = [(name, where) for name, where in (*steps, *gates) if name not in parts and name != WHOLE]
        if not parts and (steps or gates or self.head.job):
            where = (*(where for _, where in (*steps, *gates)), "job")[0]
            raise ToolchainError(
                f"{self.head.model!r} is one network and no pipeline, so nothing is for a part of it", where=where
            )
        raise_faults([unknown("part", name, parts, where=where) for name, where in asked])

    def with_weights(self, mode: Literal["copy", "link"]) -> Recipe:
        """The same recipe with what became of weights on disk said."""
        export = self.head.export.model_copy(update={"weights": mode})
        return replace(self, head=self.head.model_copy(update={"export": export}))

    def moved(self, folder: Path) -> Recipe:
        """The same recipe for a file in another folder: relative paths lead to where they did, absolute ones stay."""

        def move(path: str) -> str:
            if Path(path).is_absolute():
                return path
            return Path(os.path.relpath(self.folder.resolve() / path, folder.resolve())).as_posix()

        def move_model(text: str) -> str:
            return move(text) if self.path(text).is_dir() else sources.with_path(text, self.folder, move)

        changes: dict[str, Any] = {"model": sources.with_path(self.head.model, self.folder, move)}
        if self.head.weights:
            changes["weights"] = move(self.head.weights)
        if self.head.calibration.file:
            file = move(self.head.calibration.file)
            changes["calibration"] = self.head.calibration.model_copy(update={"file": file})
        steps = tuple(step.moved(move, move_model) for step in self.steps)
        return replace(self, head=self.head.model_copy(update=changes), steps=steps, folder=folder)

    def as_toml(self, resolved: Mapping[str, Mapping[str, Any]] | None = None) -> str:
        """The recipe with every default spelled out.

        Args:
            resolved: by target name, parameters that were ``auto`` and what they became.
        """
        head = self.head.model_dump(by_alias=True, exclude_none=True)
        content: dict[str, Any] = {key: value for key, value in head.items() if not isinstance(value, dict)}
        content |= {key: value for key, value in head.items() if isinstance(value, dict)}
        content["steps"] = [
            {"pass": step.name(), **({"parts": list(parts)} if parts else {}), **bare(step)}
            for step, parts in zip(self.steps, self.only, strict=True)
        ]
        content["targets"] = [
            {
                "target": t.target.name(),
                "optional": t.optional,
                **({"name": t.called} if t.called else {}),
                **bare(t.target),
                **(resolved or {}).get(t.name, {}),
            }
            for t in self.targets
        ]
        return tomli_w.dumps(content)


def bare(parameters: BaseModel) -> dict[str, Any]:
    """Parameters as TOML can hold them: no nulls."""
    return parameters.model_dump(mode="json", exclude_none=True)


WHOLE = "whole"
"""What the whole job of a pipeline is called, beside its parts."""

NAME = re.compile("[A-Za-z0-9_]+")
"""What a target may be called, since folders and gates are named after it."""


def threads_here() -> int:
    """Cores that this process may use: those it may run on, and no more than a container's quota is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = machine.core_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def read(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        ToolchainError: every fault at once, each with file and key.
    """
    content = read_toml(path, what="the recipe", absent=f"there is no recipe {str(path)!r}")
    return make(content, where=path.name, folder=path.parent)


def make(content: Mapping[str, Any], *, where: str = "", folder: Path = Path()) -> Recipe:
    """Check a recipe's content and resolve its names.

    Args:
        content: as TOML gives it.
        where: what errors call it.
        folder: where relative paths start.
    """
    faults: list[ToolchainError] = []

    def attempt(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except FaultsError as several:
            faults.extend(several.faults)
        except ToolchainError as fault:
            faults.append(fault)
        return None

    rest = {key: value for key, value in content.items() if key not in ("steps", "targets")}
    head: Head | None = None
    try:
        head = Head.model_validate(rest)
    except ValidationError as error:
        faults.extend(invalid(error, what="recipe", where=where, model=Head))
    step_tables = tables(content, "steps", where, faults)
    steps = [attempt(partial(read_step, table, place_in(where, f"steps[{i}]"))) for i, table in enumerate(step_tables)]
    only = [attempt(partial(parts_asked, table, place_in(where, f"steps[{i}]"))) for i, table in enumerate(step_tables)]
    targets = [
        attempt(partial(read_target, table, place_in(where, f"targets[{i}]")))
        for i, table in enumerate(tables(content, "targets", where, faults))
    ]
    named = [t.name for t in targets if t]
    twice = sorted({name for name in named if named.count(name) > 1})
    faults += [
        ToolchainError(
            f"target {name!r} stands twice",
            where=place_in(where, "targets"),
            help='tell them apart: name = "another", or --target NAME:name=another',
        )
        for name in twice
    ]
    gates = [attempt(partial(parse, text, known=gate_names())) for text in (head.gates if head else ())]
    faults += [
        ToolchainError(
            f"a gate asks for target {gate.target!r}, which the recipe lacks", where=place_in(where, "gates")
        )
        for gate in gates
        if gate and gate.target and gate.engine not in named
    ]
    sound = [(step, parts) for step, parts in zip(steps, only, strict=True) if step and parts is not None]
    faults.extend(order_faults([step for step, _ in sound], where, [parts for _, parts in sound]))
    if head:
        faults.extend(kind_faults([step for step in steps if step], head.model, where))
        faults.extend(setting_faults(head, where))
    found, notes = format_faults([step for step in steps if step], [target for target in targets if target], where)
    raise_faults([*faults, *found])
    assert head is not None
    return Recipe(
        head=head,
        steps=tuple(steps),
        targets=tuple(targets),
        gates=tuple(gates),
        folder=folder,
        notes=tuple(notes),
        only=tuple(only),
    )


def place_in(where: str, key: str) -> str:
    """File and key."""
    return f"{where}, {key}" if where else key


def tables(content: Mapping[str, Any], key: str, where: str, faults: list[ToolchainError]) -> list[dict[str, Any]]:
    """The tables of an array; anything else is a fault."""
    value = content.get(key, [])
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    faults.append(ToolchainError(f"{key} must be an array of tables, [[{key}]]", where=place_in(where, key)))
    return []


def read_step(table: Mapping[str, Any], where: str) -> Pass:
    """One step: ``pass`` and its parameters."""
    name = table.get("pass")
    if not isinstance(name, str):
        raise ToolchainError('a step needs pass = "NAME"', where=where)
    cls = catalog.pass_class(name, where=where)

    def build() -> Pass:
        step = cls(**{key: value for key, value in table.items() if key not in ("pass", "parts")})
        step.refuse_incomplete()
        return step

    step: Pass = placed(build, where)
    return step


def parts_asked(table: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The parts of a pipeline that a step is for; empty for all."""
    names = table.get("parts", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ToolchainError(
            f"parts is {names!r}; it is an array of names", where=where, help='for example: parts = ["transformer"]'
        )
    return tuple(names)


def read_target(table: Mapping[str, Any], where: str) -> TargetStep:
    """One target: ``target``, ``optional``, ``name`` and its parameters."""
    name, optional, called = table.get("target"), table.get("optional", False), table.get("name", "")
    if not isinstance(name, str):
        raise ToolchainError('a target needs target = "NAME"', where=where)
    if not isinstance(optional, bool):
        raise ToolchainError(f"optional is {optional!r}; it is true or false", where=where)
    if not isinstance(called, str) or (called and not NAME.fullmatch(called)):
        raise ToolchainError(f"name is {called!r}; it has letters, digits and underscores", where=where)
    cls = catalog.target_class(name, where=where)
    rest = {key: value for key, value in table.items() if key not in ("target", "optional", "name")}
    return TargetStep(target=placed(lambda: cls(**rest), where), optional=optional, called=called)


def placed(build: Callable[[], Any], where: str) -> Any:
    """Build something, and put ``where`` before the key of each of its faults."""
    try:
        return build()
    except ToolchainError as error:
        faults = error.faults if isinstance(error, FaultsError) else (error,)
        raise FaultsError(
            [ToolchainError(f.message, where=f"{where}.{f.where}" if f.where else where, help=f.help) for f in faults]
        ) from None


def order_faults(steps: list[Pass], where: str, only: Sequence[Sequence[str]] = ()) -> list[ToolchainError]:
    """Steps that need what a step before them destroyed, or what none established; of each part of a pipeline alone.

    Args:
        steps: in order.
        where: what errors call the recipe.
        only: for each step the parts that it is for; empty: all of them.
    """
    found: dict[str, ToolchainError] = {}
    for part in dict.fromkeys(name for names in (*only, ("",)) for name in names):
        mine = [i for i in range(len(steps)) if not only or not only[i] or part in only[i]]
        own = [steps[i] for i in mine]
        absent = missing(own)
        order = legal_order(own) if absent else None
        faults = (order_fault(own, each, order, place_in(where, f"steps[{mine[each.step]}]")) for each in absent)
        found |= {str(fault): fault for fault in faults}
    return list(found.values())


def order_fault(steps: list[Pass], absent: Missing, order: list[int] | None, where: str) -> ToolchainError:
    """Why a step cannot stand where it does, and what can be done: another order, where there is one."""
    step, fact = steps[absent.step], absent.fact
    if absent.by is None:
        return ToolchainError(f"{step.name()} needs {fact.words}, and no step before it gives that", where=where)
    earlier = steps[absent.by]
    message = f"{step.name()} cannot come after {earlier.name()}, which leaves {fact.gone}: it needs {fact.words}"
    if order is not None:
        help_ = f"change their order: {', '.join(steps[place].name() for place in order)}"
    elif step.name() == earlier.name():
        help_ = "a recipe can hold it once: put both settings into one step, or leave one out"
    elif legal_order([step, earlier]):
        help_ = f"{step.name()} before {earlier.name()} would do, but another step stands in the way: leave one out"
    else:
        help_ = f"nor can {earlier.name()} come after {step.name()}: they exclude each other, so leave one out"
    return ToolchainError(message, where=where, help=help_)


def kind_faults(steps: list[Pass], model: str, where: str) -> list[ToolchainError]:
    """Steps that work on modules where the model is a graph, or the other way round."""
    given = sources.gives(model)
    wrong = {i: step for i, step in enumerate(steps) if step.works_on != given}
    fitting = [name for name in catalog.entries("passes") if wrong and catalog.pass_class(name).works_on == given]
    return [
        ToolchainError(
            f"{step.name()} works on {WORDS[step.works_on]}; {model!r} is one of the {WORDS[given]}",
            where=place_in(where, f"steps[{i}]"),
            help=f"passes for {WORDS[given]}: {', '.join(fitting)}",
        )
        for i, step in wrong.items()
    ]


def setting_faults(head: Head, where: str) -> list[ToolchainError]:
    """Export settings that an ONNX graph cannot follow: nothing computes it again in another type."""
    if sources.gives(head.model) != "graph" or head.export.dtype is None:
        return []
    return [
        ToolchainError(
            f"dtype is {head.export.dtype!r}; {head.model!r} is an ONNX graph, which keeps the types it was written in",
            where=place_in(where, "export.dtype"),
            help="export the PyTorch model in that type, or leave --dtype out",
        )
    ]


def format_faults(
    steps: Sequence[Pass], targets: Sequence[TargetStep], where: str
) -> tuple[list[ToolchainError], list[str]]:
    """Number formats that a target which must be built refuses; and notes on those that it emulates."""
    faults, notes = [], []
    for i, step in enumerate(steps):
        for name in step.formats:
            for entry in targets:
                target, answer = entry.target.name(), entry.target.formats[name]
                said = f"{step.name()} writes {name}, which {target}"
                if answer == "emulated":
                    notes.append(f"{said} emulates: a smaller file, and no faster arithmetic")
                elif answer != "native" and entry.optional:
                    notes.append(f"{said} refuses ({answer.removeprefix('refused: ')})")
                elif answer != "native":
                    reason = answer.removeprefix("refused: ")
                    help_ = f"make {target} optional, or take another format"
                    faults.append(
                        ToolchainError(f"{said} refuses: {reason}", where=place_in(where, f"steps[{i}]"), help=help_)
                    )
    return faults, notes


def gate_names() -> list[str]:
    """Everything that a gate may bound."""
    return gates_of(load_metrics())
