"""The report as one page: a single file that loads nothing, for a screen, a phone or paper."""

from __future__ import annotations

from pathlib import Path

from enginewright.reports import curve_plot, latency_plot, pictures, summary, words
from enginewright.reports.record import Report


def render(report: Report) -> str:
    """The page; everything that comes from the record is escaped by the template engine."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words, summary=summary, curve_plot=curve_plot, token_map=pictures.token_map_png)
    template = environment.get_template("report.html.j2")
    return template.render(report=report, plot=latency_plot.plot(report.targets))
