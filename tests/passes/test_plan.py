"""A plan on disk, with its arrays."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Decision, Declared, Facts, Plan
from enginewright.passes.quantization.grouping import DividedNorm
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8


def test_a_plan_comes_back_from_disk_with_its_arrays(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    plan = Plan(choice={"a": {"rank": 2}}, arrays={"a/weight": weight.T, "a/again": weight.T})
    plan.write(tmp_path / "01-x.json")
    back = Plan.read(tmp_path / "01-x.json")
    assert back.digest() == plan.digest()
    assert torch.equal(back.arrays["a/weight"], weight.T)

    (tmp_path / "01-x.safetensors").unlink()
    with pytest.raises(ToolchainError, match="arrays are not those"):
        Plan.read(tmp_path / "01-x.json")


def test_arrays_of_other_values_are_another_plan(tmp_path: Path) -> None:
    one = Plan(choice={"a": 1}, arrays={"a/w": torch.zeros(2)})
    assert one.digest() != Plan(choice={"a": 1}, arrays={"a/w": torch.ones(2)}).digest()
    assert one.digest() != Plan(choice={"a": 1}).digest()
    with pytest.raises(ToolchainError, match="arrays are not those"):
        Plan.from_json(one.as_json(), {"a/w": torch.ones(2)})


def test_a_plan_without_arrays_is_json_alone(tmp_path: Path) -> None:
    Plan(choice={"a": 1}).write(tmp_path / "p.json")
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert Plan.read(tmp_path / "p.json").arrays == {}


def test_without_a_source_there_is_no_score() -> None:
    with pytest.raises(ToolchainError, match="no score 'fidelity' here"):
        Context().score_of("fidelity")


def test_a_plan_says_its_schema_and_version_and_one_of_another_schema_is_refused(tmp_path: Path) -> None:
    """With the command that writes it anew: carried out as it stands, it might give another module."""
    path = tmp_path / "out" / "plans" / "01-x.json"
    path.parent.mkdir(parents=True)
    plan = Plan(choice={"a": 1})
    plan.write(path, version="0.1.0")
    content = json.loads(path.read_text())
    assert (content["schema"], content["version"]) == (1, "0.1.0")
    assert Plan.read(path).digest() == plan.digest()
    path.write_text(json.dumps({**content, "schema": 2, "version": "9.0"}))
    with pytest.raises(ToolchainError, match=r"schema 2, written by version 9.0; this version reads 1") as caught:
        Plan.read(path)
    assert f"enginewright run {tmp_path / 'out' / 'recipe.toml'} -o NEW" in str(caught.value.help)
    path.write_text(json.dumps({key: content[key] for key in ("choice", "skipped", "facts")}))
    assert Plan.read(path).digest() == plan.digest(), "of a version before schemas"


class Cut(Decision):
    """What is left of a layer."""

    arrays: ClassVar[Mapping[str, str]] = {".weight": "its new weight"}

    kept: tuple[int, ...]
    of: int
    factor: float | None = None


class Gone(Decision):
    """A layer that goes."""

    whole: bool


CUTS = Declared(name="cut", kinds=(Cut, Gone), version=1)


def test_a_plan_is_typed_when_it_is_read_and_written_without_what_was_not_set(tmp_path: Path) -> None:
    plan = Plan(
        choice={"a": Cut(kept=(0, 2), of=3), "b": Gone(whole=True)},
        skipped={"c": "it is small"},
        arrays={"a.weight": torch.ones(2)},
    )
    plan.write(tmp_path / "p.json", by=CUTS)
    content = json.loads((tmp_path / "p.json").read_text())
    assert (content["pass"], content["decision_version"]) == ("cut", 1)
    assert content["choice"] == {"a": {"kept": [0, 2], "of": 3}, "b": {"whole": True}}

    back = Plan.read(tmp_path / "p.json", CUTS)
    assert back.choice == plan.choice
    assert [type(each) for each in back.choice.values()] == [Cut, Gone]
    assert back.digest() == plan.digest() == Plan.read(tmp_path / "p.json").digest(), "typed or not"


@pytest.mark.parametrize(
    ("found", "message", "where"),
    [
        ({"kept": [1], "of": 2, "off": 3}, "a decision of cut has no setting 'off'", "choice.a.b.off"),
        ({"kept": [1]}, "a decision of cut needs 'of'", "choice.a.b.of"),
        ({"kept": [1], "of": "2"}, "of is '2'; it must be a whole number", "choice.a.b.of"),
        ({"kept": [1], "of": True}, "of is True; it must be a whole number", "choice.a.b.of"),
        ({"kept": [1, 1.5], "of": 2}, "kept.1 is 1.5; it must be a whole number", "choice.a.b.kept.1"),
        ({"whole": 1}, "whole is 1; it must be true or false", "choice.a.b.whole"),
        ([1, 2], "a decision of cut is \\[1, 2\\]; it must be a table", "choice.a.b"),
    ],
)
def test_a_decision_that_is_not_as_declared_is_refused_by_path_and_field(
    found: object, message: str, where: str, tmp_path: Path
) -> None:
    plan = Plan(choice={"a.b": found})
    with pytest.raises(ToolchainError, match=message) as caught:
        CUTS.checked(plan)
    assert caught.value.where == where
    path = tmp_path / "p.json"
    plan.write(path)
    with pytest.raises(ToolchainError, match=message) as caught:
        Plan.read(path, CUTS)
    assert caught.value.where == f"{path}: {where}"


def test_a_number_that_no_json_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    Plan(choice={"a": Cut(kept=(), of=1, factor=0.5)}).write(path)
    path.write_text(path.read_text().replace("0.5", "1e999"))
    with pytest.raises(ToolchainError, match="factor is inf; it must be a finite number"):
        Plan.read(path, CUTS)


def test_an_array_that_no_decision_declares_is_refused() -> None:
    cut = Cut(kept=(0,), of=1)
    for name in ("a.bias", "b.weight", "b.kept", "weight"):
        plan = Plan(choice={"a": cut, "b": Gone(whole=True)}, arrays={"a.weight": torch.ones(1), name: torch.ones(1)})
        with pytest.raises(ToolchainError, match=f"no decision of cut declares the plan's array '{name}'"):
            CUTS.checked(plan)
    CUTS.checked(Plan(choice={"a": cut}, arrays={"a.weight": torch.ones(1)}))


def test_an_array_that_is_needed_and_not_there_is_named() -> None:
    """As of a plan whose reference was edited: the norm is divided by what no layer is multiplied by."""
    net = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    plan = Plan(choice={"norm": DividedNorm(divided_by="a.smoth")}, arrays={"a.smoth": torch.full((4,), 2.0)})
    step = QuantizeInt8()
    step.declared.checked(plan)
    divided = step.carry_out(copy.deepcopy(net), plan, Context())
    assert torch.equal(divided.norm.weight, torch.full((4,), 0.5))
    with pytest.raises(ToolchainError, match=r"the plan lacks the array 'a\.smooth', which a decision of it needs"):
        step.carry_out(net, replace(plan, choice={"norm": DividedNorm(divided_by="a.smooth")}), Context())


def test_without_a_declaration_a_decision_is_any_json() -> None:
    plan = Plan(choice={"a": {"by": 0.5}, "b": [1]}, arrays={"x": torch.ones(1)})
    assert Declared(name="theirs", kinds=(), version=1).checked(plan) is plan


def test_decisions_of_another_version_or_pass_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out" / "plans" / "01-cut.json"
    path.parent.mkdir(parents=True)
    plan = Plan(choice={"a": Gone(whole=True)})
    plan.write(path, version="0.1.0", by=CUTS)
    newer = Declared(name="cut", kinds=(Cut, Gone), version=2)
    with pytest.raises(ToolchainError, match=r"of cut of version 1, written by version 0.1.0; this version") as caught:
        Plan.read(path, newer)
    assert f"enginewright run {tmp_path / 'out' / 'recipe.toml'} -o NEW" in str(caught.value.help)
    with pytest.raises(ToolchainError, match="is one of 'cut', and fold is to carry it out"):
        Plan.read(path, Declared(name="fold", kinds=(Cut, Gone), version=1))

    content = json.loads(path.read_text())
    del content["pass"], content["decision_version"]  # as before plans said them
    path.write_text(json.dumps(content))
    assert Plan.read(path, CUTS).choice == plan.choice
    with pytest.raises(ToolchainError, match=r"version 1, written by version 0.1.0; this version reads 2"):
        Plan.read(path, newer)


def test_the_version_of_a_pass_grows_with_any_of_its_kinds() -> None:
    class Older(QuantizeInt8):
        decisions = (Cut, Gone)

    class Newer(Older):
        decisions = (Cut, type("Gone", (Gone,), {"version": 3}))

    assert Older().declared.version == 1
    assert Newer().declared.version == 3


class Met(Facts):
    """What a cut rests on."""

    calls: int
    scores: Mapping[str, float] = Field(default={})


def met(**facts: object) -> Plan:
    """A plan read from text that has these facts."""
    choice = {"a": {"kept": [0, 2], "of": 3}}
    text = json.dumps({"choice": choice, "skipped": {}, "facts": facts})
    return Plan.from_json(text, by=Declared(name="cut", kinds=(Cut, Gone), version=1, facts=Met))


def test_facts_are_read_as_they_are_declared_and_their_text_stays() -> None:
    plan = met(calls=2, notes=["one"])
    assert plan.facts == Met(calls=2, notes=("one",))
    assert plan.facts.scores == {}
    assert json.loads(plan.as_json())["facts"] == {"calls": 2, "notes": ["one"]}, "what was never set is not written"
    assert plan.digest() == Plan.from_json(plan.as_json()).digest(), "typed or not"


@pytest.mark.parametrize(
    ("facts", "where", "message"),
    [
        ({}, "facts.calls", "calls"),
        ({"calls": "two"}, "facts.calls", "'two'"),
        ({"calls": 2, "made_up": 1}, "facts.made_up", "the facts of cut has no setting 'made_up'"),
        ({"calls": 2, "scores": {"a": "high"}}, "facts.scores.a", "'high'"),
    ],
)
def test_other_facts_are_refused_by_field(facts: dict[str, object], where: str, message: str) -> None:
    with pytest.raises(ToolchainError, match=message) as caught:
        met(**facts)
    assert caught.value.where == where


def test_a_plan_that_decides_nothing_may_lack_facts_and_one_of_a_pass_that_declares_none_any() -> None:
    declared = Declared(name="cut", kinds=(Cut, Gone), version=1, facts=Met)
    empty = declared.checked(Plan(choice={}, skipped={"": "none"}))
    assert isinstance(empty.facts, Met)
    assert empty.facts.as_json() == {}
    free = Declared(name="free", kinds=(), version=1).checked(Plan(choice={"a": 1}, facts={"mine": [1, 2]}))
    assert free.facts.as_json() == {"mine": [1, 2]}
    assert free.facts.notes == ()
