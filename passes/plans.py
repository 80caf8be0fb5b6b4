"""What a pass decided: a plan of typed decisions, small enough to read, keep, replay and search over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from safetensors.torch import save_file
from torch import Tensor

from enginewright.ground.errors import ToolchainError, invalid, raise_faults, shown
from enginewright.ground.reading import parse_json, read_tensors, read_text
from enginewright.ground.writing import write_text

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # typing's own knows no default before Python 3.13

    D = TypeVar("D", default=Any)
    F = TypeVar("F", bound="Facts", default=Any)
else:
    from typing import TypeVar

    D, F = TypeVar("D"), TypeVar("F")

Json = Any

M = TypeVar("M", bound=BaseModel)

PLAN_SCHEMA = 1
"""Of written plans; raised when one that was written before would be carried out otherwise."""


class Decision(BaseModel):
    """What a pass decided for one place of a model: a layer, a stack of blocks, a norm.

    What was never set is not written, so that a new field with a default leaves older plans as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: ClassVar[int] = 1
    """Raised when a decision that was written before would be read or carried out otherwise."""
    arrays: ClassVar[Mapping[str, str]] = {}
    """Tensors that a plan holds for it: how their names go on after the module path, and what they are."""

    def array_names(self, path: str) -> set[str]:
        """Names of the arrays that a plan may hold for this decision at a module path."""
        return {f"{path}{suffix}" for suffix in self.arrays}

    def as_json(self) -> dict[str, Json]:
        """The fields that were set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class Part(BaseModel):
    """A part of some facts that has fields of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Curve(Part):
    """A trade that a step chose from: what could be had, and what was taken; (x, y) pairs."""

    x: str = Field(description="what is paid")
    y: str = Field(description="what is lost")
    points: tuple[tuple[float, float], ...] = Field(description="what could be had")
    chosen: tuple[float, float] = Field(description="what was taken")


class TokenMap(Part):
    """Which tokens of one input stayed."""

    left: tuple[tuple[int, ...], ...] = Field(description="rows of how many borders each token passed")
    borders: int = Field(description="of the model")
    picture: tuple[tuple[tuple[int, int, int], ...], ...] = Field(
        (), description="rows of [red, green, blue], 0 to 255, a pixel a token; empty: the input is none"
    )


class Facts(BaseModel):
    """What a plan's decisions rest on, or have in common: of the whole model, where a decision is of one place.

    What was never set is not written, so that a new field with a default leaves older plans as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: ClassVar[int] = 1
    """Raised when facts that were written before would be read or carried out otherwise."""

    notes: tuple[str, ...] = Field((), description="what the report says of the step, as sentences without full stops")
    curve: Curve | None = Field(None, description="what could be chosen from")
    maps: tuple[TokenMap, ...] = Field((), description="which tokens of some inputs stayed")

    def as_json(self) -> dict[str, Json]:
        """The fields that were set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class AnyFacts(Facts):
    """Facts of a pass that declares none, or of a plan that nobody is to carry out: JSON that nothing checks."""

    model_config = ConfigDict(extra="allow")

    notes: Json = ()
    curve: Json = None
    maps: Json = ()


def as_json(found: Json) -> Json:
    """A decision, or facts, as JSON; those of a pass that declares none are JSON already."""
    return found.as_json() if isinstance(found, Decision | Facts) else found


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a pass says of its decisions.

    Args:
        name: of the pass.
        kinds: of decision; empty: any JSON, because the pass declares none.
        version: of all of them, and of the facts, together.
        facts: their kind.
    """

    name: str
    kinds: tuple[type[Decision], ...]
    version: int
    facts: type[Facts] = AnyFacts

    def checked(self, plan: Plan) -> Plan:
        """The same plan, with each decision of a kind that is declared, and its facts of theirs.

        Raises:
            ToolchainError: a decision or the facts have another field, lack one or have one of a wrong type, or an
                array is none that a decision declares.
        """
        facts = self.facts_of(plan)
        plan = plan if facts is plan.facts else replace(plan, facts=facts)
        if not self.kinds:
            return plan
        choice = {path: self.decision(path, found) for path, found in plan.choice.items()}
        known = {name for path, found in choice.items() for name in found.array_names(path)}
        if strange := sorted(plan.arrays.keys() - known):
            raise ToolchainError(
                f"no decision of {self.name} declares the plan's array {strange[0]!r}", where=f"arrays.{strange[0]}"
            )
        return replace(plan, choice=choice)

    def decision(self, path: str, found: Json) -> Decision:
        """One decision, read as the kind that shares most fields with it."""
        if isinstance(found, self.kinds):
            return found
        fields = as_json(found)
        where = f"choice.{path}" if path else "choice"
        if not isinstance(fields, Mapping):
            raise ToolchainError(f"a decision of {self.name} is {shown(fields)}; it must be a table", where=where)
        kind = max(self.kinds, key=lambda each: len(fields.keys() & names_of(each)))
        return read_as(kind, fields, what=f"a decision of {self.name}", where=where)

    def facts_of(self, plan: Plan) -> Facts:
        """A plan's facts, of the kind that is declared; a plan that decides nothing may lack some."""
        if isinstance(plan.facts, Facts) and (type(plan.facts) is self.facts or self.facts is AnyFacts):
            return plan.facts
        kind = self.facts if plan.choice else lacking_some(self.facts)
        return read_as(kind, as_json(plan.facts), what=f"the facts of {self.name}", where="facts")


@cache
def lacking_some(kind: type[Facts]) -> type[Facts]:
    """A kind of facts for plans that decided nothing: each field may be missing."""
    fields: dict[str, Any] = {
        name: (each.annotation, None) for name, each in kind.model_fields.items() if each.is_required()
    }
    return create_model(kind.__name__, __base__=kind, **fields)


def read_as(kind: type[M], fields: Json, *, what: str, where: str) -> M:
    """A declared kind out of parsed JSON."""
    try:
        # As JSON, where a list may be a tuple; strict, because no text is a number and no number a flag.
        return kind.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise_faults(invalid(error, what=what, where=where, model=kind))
        raise


def names_of(kind: type[Decision]) -> set[str]:
    """The names that a decision's fields have in JSON."""
    return {declared.alias or name for name, declared in kind.model_fields.items()}


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[D, F]):
    """All that a pass decided.

    Args:
        choice: what to do, by module path.
        skipped: what was left alone, by module path, and why.
        facts: what else the decisions rest on (calibration, scores), or what they have in common. The report shows
            their notes, curve and maps.
        arrays: tensors that were decided (learned or rounded weights), by a name that begins with the module path.
    """

    choice: Mapping[str, D]
    skipped: Mapping[str, str] = field(default_factory=dict)
    facts: F = field(default_factory=Facts)  # type: ignore[assignment]
    arrays: Mapping[str, Tensor] = field(default_factory=dict)

    def array(self, name: str) -> Tensor:
        """One of the arrays. Raises ``ToolchainError`` where the plan lacks it."""
        if name not in self.arrays:
            raise ToolchainError(f"the plan lacks the array {name!r}, which a decision of it needs", where=name)
        return self.arrays[name]

    def as_json(self) -> str:
        """The plan as text, its arrays by their digests; equal plans give equal text."""
        choice = {path: as_json(decision) for path, decision in self.choice.items()}
        content: dict[str, Json] = {"choice": choice, "skipped": self.skipped, "facts": as_json(self.facts)}
        if self.arrays:
            content["arrays"] = {name: digest_of(array) for name, array in self.arrays.items()}
        return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"

    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.as_json().encode()).hexdigest()

    @staticmethod
    def from_json(text: str, arrays: Mapping[str, Tensor] | None = None, *, by: Declared | None = None) -> Plan:
        """Read what ``as_json`` wrote, with the arrays that it names.

        Args:
            text: JSON.
            arrays: by name.
            by: the pass that is to carry it out; None: decisions stay JSON, and nothing is asked of them.

        Raises:
            ToolchainError: an array is missing, unknown or has another content than it had, or a decision is not as the
                pass declares it.
        """
        content = parse_json(text, what="the plan")
        parts = (content.get(key) for key in ("choice", "skipped", "facts")) if isinstance(content, dict) else [None]
        if not all(isinstance(part, dict) for part in parts) or not isinstance(content.get("arrays", {}), dict):
            raise ToolchainError("the plan lacks choice, skipped or facts: no plan of ours")
        arrays = arrays or {}
        named = content.get("arrays", {})
        if named.keys() != arrays.keys() or any(digest_of(arrays[name]) != named[name] for name in named):
            raise ToolchainError("the plan's arrays are not those that it was made with")
        facts = read_as(AnyFacts, content["facts"], what="the plan", where="facts")
        plan: Plan = Plan(choice=content["choice"], skipped=content["skipped"], facts=facts, arrays=arrays)
        return by.checked(plan) if by else plan

    def write(self, path: Path, *, by: Declared | None = None, version: str = "") -> None:
        """Write ``path`` as JSON and, where there are arrays, a safetensors file beside it.

        Args:
            path: the file.
            by: the pass that decided.
            version: of the toolchain, for who reads it later.
        """
        made_by = {"pass": by.name, "decision_version": by.version} if by else {}
        content = {"schema": PLAN_SCHEMA, "version": version, **made_by, **json.loads(self.as_json())}
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
        if self.arrays:
            # Each on its own: safetensors refuses tensors that share memory, as a tied weight does.
            whole = {name: array.detach().clone().contiguous() for name, array in self.arrays.items()}
            save_file(whole, path.with_suffix(".safetensors"))

    @staticmethod
    def read(path: Path, by: Declared | None = None) -> Plan:
        """Read what ``write`` wrote.

        Args:
            path: the file.
            by: the pass that is to carry it out, as for ``from_json``.

        Raises:
            ToolchainError: it is no plan, one of another schema, or not such as the pass writes now.
        """
        beside = path.with_suffix(".safetensors")
        arrays = read_tensors(beside, what="the plan's arrays") if beside.exists() else {}
        try:
            text = read_text(path, what="the plan")
            refuse_other(parse_json(text, what="the plan"), path, by)
            return Plan.from_json(text, arrays, by=by)
        except ToolchainError as fault:
            where = f"{path}: {fault.where}" if fault.where and fault.where != str(path) else str(path)
            raise ToolchainError(fault.message, where=where, help=fault.help or "export again") from fault


def refuse_other(content: Json, path: Path, by: Declared | None) -> None:
    """Raise for a plan of another schema, pass or version of decisions, with the command that writes it anew.

    A plan that says neither pass nor version was written before plans did, and is of version 1.
    """
    if not isinstance(content, dict):
        return
    tool = f", written by version {content['version']}" if content.get("version") else ""
    recipe = path.parent.parent / "recipe.toml"
    anew = f"write the artifact anew: enginewright run {recipe} -o NEW"
    if (found := content.get("schema", PLAN_SCHEMA)) != PLAN_SCHEMA:
        raise ToolchainError(
            f"the plan has schema {found!r}{tool}; this version reads {PLAN_SCHEMA}", where=str(path), help=anew
        )
    if by is None:
        return
    if (name := content.get("pass", by.name)) != by.name:
        raise ToolchainError(f"the plan is one of {name!r}, and {by.name} is to carry it out", where=str(path))
    if (found := content.get("decision_version", 1)) != by.version:
        raise ToolchainError(
            f"the plan has decisions of {by.name} of version {found!r}{tool}; this version reads {by.version}",
            where=str(path),
            help=anew,
        )


def digest_of(array: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    flat = array.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{array.dtype}{list(array.shape)}".encode() + flat.tobytes()).hexdigest()
