"""A plan on disk, with its arrays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan


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
