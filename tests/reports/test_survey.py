"""The page of a survey's techniques: equal to what is declared, and declared of what there is."""

from __future__ import annotations

import pytest

from enginewright import catalog
from enginewright.reports import sheets
from enginewright.reports.benchmarks import methods, survey
from enginewright.reports.sheets import Line, Sheet

DECLARED = survey.declared()
TECHNIQUES = [technique for family in DECLARED.families for technique in family.techniques]


def test_the_page_is_what_is_declared_and_measured() -> None:
    found = {sheet.name: sheet for sheet in sheets.read_all()}
    assert survey.PAGE.read_text() == survey.page(DECLARED, found), "python -m enginewright.reports.benchmarks.survey"


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.name)
def test_a_technique_names_what_there_is_or_says_why_nothing_does_it(technique: survey.Technique) -> None:
    for kind in ("passes", "targets", "models"):
        assert set(getattr(technique, kind)) <= set(catalog.entries(kind))
    assert set(technique.sheets) <= set(methods.declared())
    assert technique.passes or technique.targets or technique.models or technique.why_not
    assert all(figure.found() is not None for figure in technique.recorded)


def test_a_method_is_shown_with_the_worst_of_its_lines_and_its_link() -> None:
    content = {"what": "a", "asked": "b", "command": "c"}
    lines = (
        Line(row="gained", verdict="met", **content),  # type: ignore[arg-type]
        Line(row="gained", verdict="missed", **content),  # type: ignore[arg-type]
    )
    sheet = Sheet(name="toy", title="A", paper="B", models=(), lines=lines, environment={}, recorded="2026-01-01")
    assert "[toy](METHODS.md#toy): exported **absent**, gained **missed** (1 of 2 met)" in survey.of_method(
        "toy", {"toy": sheet}
    )
    assert survey.of_method("toy", {}) == "toy: declared, and not measured yet"


def test_what_does_a_technique_is_said_by_kind() -> None:
    technique = survey.Technique(name="a", passes=("x", "y"), targets=("z",))
    assert survey.done_by(technique) == "passes `x`, `y`; target `z`"
