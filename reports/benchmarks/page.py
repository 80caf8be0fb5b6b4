"""Sheets as they are written, and the page that shows them all, ``METHODS.md``."""

from __future__ import annotations

import json

from enginewright.reports.sheets import FOLDER, ROWS, SIGNS, Sheet, read_all

PAGE = FOLDER.parent / "METHODS.md"


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
