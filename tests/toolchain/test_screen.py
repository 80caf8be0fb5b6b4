"""Tables and sentences: with colour on a terminal, plain anywhere else, and never Markdown."""

from __future__ import annotations

import io

import pytest

from enginewright import screen
from enginewright.reports.terminal import blocks
from tests.reports.example import example_report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def a_terminal_that_knows_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def shown(file: io.StringIO) -> str:
    screen.show(blocks(example_report()), file=file)
    return file.getvalue()


def test_a_pipe_gets_plain_text() -> None:
    text = shown(io.StringIO())
    assert "\x1b" not in text
    assert "| ---" not in text
    assert "## " not in text
    assert "&lt;" not in text
    heads = next(line for line in text.splitlines() if line.startswith("GATE"))
    rows = [line for line in text.splitlines() if line.startswith(("✓ met", "✗ missed", "○ not measured"))]
    assert len(rows) == 3
    assert all(row[heads.index("TARGET")] in "ot" for row in rows)


def test_a_terminal_gets_colour_unless_it_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal())
    assert "\x1b[1;31m" in text
    assert "frechet_ratio" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in shown(Terminal())
    assert "\x1b[31m" not in shown(Terminal())


def test_what_stands_in_a_cell_is_text() -> None:
    file = Terminal()
    screen.table([("[red]x[/red]", ":smile:")], ("A", "B"), file=file)
    assert "[red]x[/red]" in file.getvalue()
    assert ":smile:" in file.getvalue()


def test_columns_of_plain_text_stand_below_their_heads() -> None:
    assert screen.aligned([("a", "long text"), ("longer", "x")], ("NAME", "SUMMARY")) == (
        "NAME    SUMMARY\na       long text\nlonger  x"
    )
    assert screen.aligned([("key", "value")], ("", "")) == "key  value"
    assert screen.aligned([], ("NAME", "SUMMARY")) == "NAME  SUMMARY"
