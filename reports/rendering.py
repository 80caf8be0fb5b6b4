"""Write everything that people and CI read of a report: ``report.html``, ``report.md``, ``junit.xml``."""

from __future__ import annotations

from pathlib import Path

from enginewright.ground.writing import write_text
from enginewright.reports import html, junit, markdown
from enginewright.reports.record import Report


def write_all(report: Report, folder: Path) -> None:
    """Render a report into a folder, each file whole or not at all; a link in its place is replaced, not followed.

    Raises:
        ToolchainError: the folder cannot be written; the old files are whole.
    """
    written = {
        "report.html": html.render(report),
        "report.md": markdown.render(report),
        "junit.xml": junit.render(report),
    }
    for name, text in written.items():
        write_text(folder / name, text)
