"""What was measured of each method: a sheet each, ``reports/methods/NAME.json``.

A benchmark writes them, which the wheel leaves out; here they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from enginewright.ground.errors import invalid, raise_faults
from enginewright.ground.reading import read_json

FOLDER = Path(__file__).resolve().parent / "methods"

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
