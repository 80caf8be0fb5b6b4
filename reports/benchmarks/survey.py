"""Which pass or target does each technique of a survey of transformer inference, and what was measured of it.

    python -m enginewright.reports.benchmarks.survey

Writes ``reports/SURVEY.md`` from ``reports/survey.toml``, the sheets of methods and what benchmarks recorded.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping

from enginewright.reports import sheets
from enginewright.reports.benchmarks.methods import Declared, Recorded, number_said
from enginewright.reports.benchmarks.page import table
from enginewright.reports.sheets import Row, Sheet

DECLARATION = sheets.FOLDER.parent / "survey.toml"
PAGE = sheets.FOLDER.parent / "SURVEY.md"
SHOWN: tuple[Row, ...] = ("exported", "gained", "claim")
"""Rows of a method's sheet that say how it does, and not whether it is what it should be."""


class Figure(Recorded):
    """A number that a benchmark recorded.

    Args:
        what: what stands behind the number, with another to hold it against.
    """

    what: str


class Technique(Declared):
    """One technique of a family.

    Args:
        name: in the survey's terms.
        passes: that do it.
        targets: that do it.
        models: of which it is a part.
        sheets: methods that rest on it.
        recorded: what was measured of it.
        why_not: why nothing does it, or why nothing was measured.
    """

    name: str
    passes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    sheets: tuple[str, ...] = ()
    recorded: tuple[Figure, ...] = ()
    why_not: str = ""


class Family(Declared):
    """Techniques of one kind."""

    name: str
    techniques: tuple[Technique, ...]


class Survey(Declared):
    """``survey.toml``."""

    title: str
    source: str
    families: tuple[Family, ...]


def declared() -> Survey:
    """The declaration."""
    return Survey.model_validate(tomllib.loads(DECLARATION.read_text()))


def page(survey: Survey, found: Mapping[str, Sheet]) -> str:
    """``SURVEY.md``.

    Args:
        survey: what does what.
        found: sheets that were measured, by method.
    """
    parts = [
        f"# {survey.title}",
        f"{survey.source[0].upper()}{survey.source[1:]}. Which pass, target or reference model does each of its "
        "techniques here, and what was measured; [METHODS.md](METHODS.md) has the lines behind each verdict. Written "
        "by `python -m enginewright.reports.benchmarks.survey`.",
    ]
    head = ["Technique", "Done by", "Recorded", "Methods that rest on it", "Remark"]
    for family in survey.families:
        rows = [
            [
                technique.name,
                done_by(technique) or "–",
                "; ".join(map(recorded, technique.recorded)) or "–",
                "; ".join(of_method(name, found) for name in technique.sheets) or "–",
                technique.why_not,
            ]
            for technique in family.techniques
        ]
        parts += [f"## {family.name}", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def done_by(technique: Technique) -> str:
    """Passes, targets and models in words."""
    kinds = {"pass": technique.passes, "target": technique.targets, "model": technique.models}
    return "; ".join(f"{kind}{plural(kind, names)} {quoted(names)}" for kind, names in kinds.items() if names)


def plural(kind: str, names: tuple[str, ...]) -> str:
    """What makes a word more than one."""
    return "" if len(names) == 1 else "es" if kind == "pass" else "s"


def quoted(names: Iterable[str]) -> str:
    """Names as code."""
    return ", ".join(f"`{name}`" for name in names)


def recorded(figure: Figure) -> str:
    """One figure with what measures it again."""
    return f"{number_said(figure.found())} {figure.what} (`{figure.command}`)"


def of_method(name: str, found: Mapping[str, Sheet]) -> str:
    """A method's verdicts with a link to its sheet."""
    if name not in found:
        return f"{name}: declared, and not measured yet"
    verdicts = ", ".join(f"{row} {found[name].verdict_of(row)}" for row in SHOWN)
    return f"[{name}](METHODS.md#{name}): {verdicts}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(declared(), {sheet.name: sheet for sheet in sheets.read_all()}))


if __name__ == "__main__":
    main()
