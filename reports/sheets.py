"""What was measured of each method: a sheet each, ``reports/methods/NAME.json``, and the page that shows them all.

A sheet is written by ``python -m enginewright.reports.benchmarks.methods``, never by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from enginewright.ground.errors import invalid, raise_faults
from enginewright.ground.reading import read_json

FOLDER = Path(__file__).resolve().parent / "methods"
PAGE = FOLDER.parent / "METHODS.md"

Row = Literal["counts", "faithful", "exported", "gained", "claim", "trained"]
ROWS: tuple[Row, ...] = ("counts", "faithful", "exported", "gained", "claim", "trained")
Verdict = Literal["met", "missed", "not_measurable"]
SIGNS: Mapping[Verdict, str] = {"met": "met", "missed": "**missed**", "not_measurable": "not measurable here"}


class Part(BaseModel):
    """A piece of a sheet; unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(Part):
    """One thing that a method's sheet must show.

    Args:
        row: the kind of thing.
        what: of what, such as a size.
        asked: what should come out, and who says so.
        measured: what came out; empty where nothing was measured.
        verdict: whether that is what was asked.
        why: what a reader must know beside it: the reason, or what was tried.
        command: what measures it again.
    """

    row: Row
    what: str
    asked: str
    measured: str = ""
    verdict: Verdict
    why: str = ""
    command: str


class Sheet(Part):
    """What was measured of one method.

    Args:
        name: of the method.
        title: in words.
        paper: where it was published.
        models: its entries in the catalogue.
        lines: what was asked and measured.
        environment: the machine.
        recorded: the day.
    """

    schema_number: Literal[1] = 1
    name: str
    title: str
    paper: str
    models: tuple[str, ...]
    lines: tuple[Line, ...]
    environment: dict[str, Any]
    recorded: str

    def verdict_of(self, row: Row) -> str:
        """A row in words: the worst of its lines."""
        found = [line.verdict for line in self.lines if line.row == row]
        if not found:
            return "**absent**"
        worst = next(each for each in ("missed", "not_measurable", "met") if each in found)
        return SIGNS[worst] if len(set(found)) == 1 else f"{SIGNS[worst]} ({found.count('met')} of {len(found)} met)"


def read(path: Path) -> Sheet:
    """Read one sheet.

    Raises:
        ToolchainError: it is none.
    """
    content = read_json(path, what=path.name)
    try:
        return Sheet.model_validate(content)
    except ValidationError as error:
        raise_faults(invalid(error, what=path.name, where=str(path)))
        raise


def read_all() -> list[Sheet]:
    """Every sheet, by name."""
    return [read(path) for path in sorted(FOLDER.glob("*.json"))]


def write(sheet: Sheet) -> None:
    """Write a sheet, and the page anew."""
    (FOLDER / f"{sheet.name}.json").write_text(json.dumps(sheet.model_dump(mode="json"), indent=2) + "\n")
    PAGE.write_text(page(read_all()))


def page(sheets: list[Sheet]) -> str:
    """``METHODS.md``: a table of all methods, then the lines of each."""
    head = ["Method", *(row.capitalize() for row in ROWS)]
    rows = [[f"[{sheet.name}](#{sheet.name})", *(sheet.verdict_of(row) for row in ROWS)] for sheet in sheets]
    parts = [
        "# Methods",
        "What was measured of each published method, and the command that measures it again. Written by "
        "`python -m enginewright.reports.benchmarks.methods NAME`; figures of time were taken with nothing else "
        "running. A method's row is green where every line of its sheet is met.",
        table(head, rows),
        *(section(sheet) for sheet in sheets),
    ]
    return "\n\n".join(parts) + "\n"


def section(sheet: Sheet) -> str:
    """One method."""
    machine = ", ".join(f"{key} {sheet.environment[key]}" for key in ("cpu", "cores") if key in sheet.environment)
    lines = [
        [line.row, line.what, line.asked, line.measured or "–", SIGNS[line.verdict], line.why, f"`{line.command}`"]
        for line in sheet.lines
    ]
    head = ["Row", "What", "Asked", "Measured", "Verdict", "Remark", "Command"]
    models = f"Models: {', '.join(f'`{model}`' for model in sheet.models)}. " if sheet.models else ""
    return (
        f"## {sheet.name}\n\n{sheet.title} ({sheet.paper}). {models}Recorded {sheet.recorded}"
        f"{f' on {machine}' if machine else ''}.\n\n{table(head, lines)}"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
