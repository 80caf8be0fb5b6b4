"""Sheets of methods: declared, written and shown alike."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from enginewright import catalog
from enginewright.ground.errors import ToolchainError
from enginewright.reports import record, sheets
from enginewright.reports.benchmarks import methods, page
from enginewright.reports.sheets import Line, Sheet
from tests.conftest import ROOT

DECLARED = methods.declared()


def line(**changed: Any) -> Line:
    content = {"row": "counts", "what": "a | b", "asked": "1", "measured": "1", "verdict": "met", "command": "x"}
    return Line(**{**content, **changed})


def sheet(*lines: Line) -> Sheet:
    return Sheet(
        name="toy", title="A toy", paper="none", models=("toy",), lines=lines, environment={}, recorded="2026-01-01"
    )


def test_the_page_is_what_the_sheets_say() -> None:
    found = sheets.read_all()
    assert (page.PAGE.read_text() if found else "") == (page.page(found) if found else "")


def test_a_sheet_has_every_row_and_is_of_what_is_declared() -> None:
    for path in sheets.FOLDER.glob("*.json"):
        found = sheets.read(path)
        assert {each.row for each in found.lines} == set(sheets.ROWS), path.name
        assert (found.name, found.models) == (path.stem, DECLARED[path.stem].models)
        assert all(each.why or each.verdict == "met" or each.measured for each in found.lines), path.name


@pytest.mark.parametrize("name", DECLARED)
def test_a_declaration_names_what_there_is(name: str) -> None:
    method = DECLARED[name]
    entries = catalog.entries("models")
    recipes = catalog.entries("recipes")
    assert method.models or method.passes
    assert all(each in catalog.entries("passes") for each in method.passes)
    sizes = [*method.tiny, *([method.published] if method.published else [])]
    for model in (*method.models, *(each for each in sizes if each not in recipes)):
        entry, _, size = model.partition(":")
        assert entry in entries, model
        assert not size or size in methods.sizes_of(catalog.load("models", entry)), model
    assert all(each in recipes for each in method.recipes)
    assert all((ROOT / test).is_file() for test in method.tests)
    assert bool(method.recipes) != bool(method.no_recipe)
    assert method.claims
    for claim in (*method.claims, *method.counted):
        assert claim.score is None or callable(methods.function_of(claim.score.function))
        assert claim.recorded is None or claim.recorded.found() is not None


def test_counts_are_held_against_the_digits_that_were_printed() -> None:
    assert methods.amount("33.1 M") == pytest.approx((33.1e6, 0.05e6))
    assert methods.amount("1 B") == pytest.approx((1e9, 0.5e9))
    assert methods.amount("4.25 G") == pytest.approx((4.25e9, 0.005e9))
    with pytest.raises(ToolchainError, match="no amount"):
        methods.amount("many")
    first = next(iter(methods.counts(DECLARED["fcaformer"], "fcaformer")))
    assert (first.measured, first.verdict) == ("6,187,560", "met")


def test_a_row_is_no_better_than_its_worst_line_and_none_may_be_absent() -> None:
    found = sheet(line(), line(verdict="missed"), line(row="claim", verdict="not_measurable"))
    assert found.verdict_of("counts") == "**missed** (1 of 2 met)"
    assert found.verdict_of("claim") == "not measurable here"
    assert found.verdict_of("gained") == "**absent**"


def test_a_page_shows_every_line_with_its_command() -> None:
    text = page.page([sheet(line(why="so it is"))])
    assert "| counts | a / b | 1 | 1 | met | so it is | `x` |" in text
    assert "[toy](#toy)" in text


def test_a_recorded_number_is_found_and_held_against_both_bounds(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    (tmp_path / "toy.json").write_text('{"runs": [{"share": 0.25}], "name": "toy"}')
    where: dict[str, Any] = {"file": "toy.json", "value": ("runs", 0, "share"), "command": "make toy"}
    for bounds, verdict in (
        ({"at_least": 0.2}, "met"),
        ({"at_least": 0.3}, "missed"),
        ({"at_most": 0.2}, "missed"),
        ({"at_least": 0.2, "at_most": 0.3}, "met"),
    ):
        claim = methods.Claim(what="a", source="b", recorded=methods.Recorded(**where, **bounds))
        line = methods.held(claim, "claim", "toy")
        assert (line.verdict, line.measured, line.command) == (verdict, "0.2500", "make toy")
    for keys, said in ((("runs", 1), "has no 1"), (("name",), "holds no number")):
        with pytest.raises(ToolchainError, match=said):
            methods.Recorded(**{**where, "value": keys}).found()


def test_a_score_that_nobody_measures_is_refused_with_the_nearest() -> None:
    with pytest.raises(ToolchainError, match="labels_rigth") as caught:
        methods.function_of("labels_rigth")
    assert "labels_right" in str(caught.value.help)


def test_an_engine_of_an_approximation_is_held_against_the_changed_module() -> None:
    errors = {"max_abs": 1.0, "mean_abs": 1.0, "cosine": 0.99, "snr_db": 10.0}
    able = dict.fromkeys(("installed", "importable", "buildable", "runnable", "built"), True)
    fidelity = [{"output": "y", "relative_l2": 0.1, **errors}]
    target = record.TargetRecord(name="onnxruntime", parameters={}, fidelity=fidelity, **able)  # type: ignore[arg-type]
    near, far, alone = (methods.engine("toy", target, "x", beside) for beside in ((1e-7, 2e-6), (1e-7, 1e-3), ()))
    assert (near.verdict, far.verdict, alone.verdict) == ("met", "missed", "missed")
    assert near.measured == "2e-06 at the typical and 0 other sizes; 0.1 to what is meant"
    assert "changed module" in near.asked
    assert "changed module" not in alone.asked


def test_weights_that_a_recipe_of_passes_changes_are_the_trained_ones() -> None:
    method = next(iter(DECLARED.values())).model_copy(update={"models": (), "passes": ("quantize_int8",)})
    recipes = ("dit-digits-int8", "tnt-8bit")
    (line,) = methods.trained(method.model_copy(update={"recipes": recipes}), "toy")
    assert (line.what, line.verdict) == ("dit:digits", "met")
    (line,) = methods.trained(method.model_copy(update={"recipes": (), "untrained": "not yet"}), "toy")
    assert (line.verdict, line.why) == ("missed", "not yet")


@pytest.mark.slow
def test_engines_are_asked_beside_the_changed_module_at_all_sizes(tmp_path: Any) -> None:
    out = tmp_path / "out"
    subprocess.run(methods.enginewright("run", "dense2moe-tiny", "-o", str(out)), check=True)
    targets = record.read(out / "report.json").targets
    found = methods.beside_changed(out, targets)
    assert list(found) == ["onnxruntime"]
    assert len(found["onnxruntime"]) == 4
    assert max(found["onnxruntime"]) < methods.ROUNDING
    assert methods.beside_changed(out, [each for each in targets if each.name != "pytorch"]) == {}


def test_a_broken_sheet_is_refused_with_its_place(tmp_path: Any) -> None:
    path = tmp_path / "odd.json"
    path.write_text('{"name": 3}')
    with pytest.raises(ToolchainError) as caught:
        sheets.read(path)
    assert str(path) in str(caught.value)
