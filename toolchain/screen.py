"""What answers look like: tables with colour on a terminal, plain aligned text anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from enginewright.reports.terminal import Line, Rows

STYLES = {"met": "bold green", "missed": "bold red", "not_measured": "bold", "quiet": "dim", "doubt": "yellow"}
"""Colours; a terminal gets none where NO_COLOR is set."""


def table(rows: Sequence[Sequence[str]], heads: Sequence[str], *, file: TextIO | None = None) -> None:
    """Print rows under their heads."""
    file = file or sys.stdout
    if file.isatty():
        console_for(file).print(rich_table(rows, heads))
    else:
        print(aligned(rows, heads), file=file)


def show(blocks: Sequence[Line | Rows], *, file: TextIO | None = None) -> None:
    """Print sentences and tables, one after the other."""
    from enginewright.reports.terminal import Line

    file = file or sys.stdout
    console = console_for(file) if file.isatty() else None
    for block in blocks:
        if not isinstance(block, Line):
            print(file=file)
            table(block.rows, block.heads, file=file)
        elif console is None:
            print(block.text, file=file)
        else:
            console.print(block.text, style=STYLES.get(block.style, ""), markup=False, highlight=False, emoji=False)


def console_for(file: TextIO) -> Any:
    """A console of rich for a terminal."""
    from rich.console import Console

    return Console(file=file)


def rich_table(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> Any:
    """A table that folds long cells; what stands in a cell is text and never markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        made.add_column(head, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def aligned(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """Columns of equal width; the last one may be long."""
    lines = [*([heads] if any(heads) else []), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) - 1)] if lines else []
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )
