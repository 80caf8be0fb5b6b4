"""Write everything that people and CI read of a report: ``report.html``, ``report.md``, ``junit.xml``."""

from __future__ import annotations

from pathlib import Path

from reports import html, junit, markdown
from reports.record import Report


def write_all(report: Report, folder: Path) -> None:
    """Render a report into a folder."""
    (folder / "report.html").write_text(html.render(report))
    (folder / "report.md").write_text(markdown.render(report))
    (folder / "junit.xml").write_text(junit.render(report))
