from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from reports import html
from reports.record import Report
from tests.reports.example import HOSTILE_PATH, example_report


class Page(HTMLParser):
    """Tags with attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report() -> Report:
    return example_report()


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(html.render(report))


def test_every_latency_sample_is_a_mark(report: Report, page: Page) -> None:
    timed = report.targets[0].latency
    assert timed is not None
    marks = [attributes for tag, attributes in page.tags if attributes.get("class") == "sample"]
    assert len(marks) == len(timed.samples_s) + len(timed.original_samples_s)
    assert len({mark["cx"] for mark in marks}) > 10


def test_a_trade_off_is_drawn_with_the_choice_in_it(report: Report, page: Page) -> None:
    curve = report.steps[1].curve
    assert curve is not None
    marks = [attributes for _, attributes in page.tags if attributes.get("class") == "trade"]
    assert len(marks) == len(curve.points) + 1
    assert curve.x in page.text


def test_token_maps_are_pictures_with_their_counts_in_words(page: Page) -> None:
    maps = [dict(attributes) for tag, attributes in page.tags if tag == "img" and "Tokens" in str(attributes["alt"])]
    assert [str(picture["alt"]).partition(": ")[2] for picture in maps] == ["2 of 4 stay", "2 of 4 stay"]
    assert all(str(picture["src"]).startswith("data:image/png;base64,") for picture in maps)


def test_hostile_text_is_text(page: Page) -> None:
    assert HOSTILE_PATH in page.text
    assert not any(tag == "script" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_it_loads_nothing(report: Report) -> None:
    text = html.render(report)
    for tag, attributes in Page(text).tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert style
    assert "url(" not in style
    assert "@import" not in style


def test_not_measured_is_never_green(report: Report) -> None:
    text = html.render(report.model_copy(update={"verdict": "not_measured", "gates": []}))
    assert not re.search(r'class="[^"]*\bmet\b', text)
    assert "not measured" in text


def test_every_verdict_figure_and_reason_is_there(report: Report, page: Page) -> None:
    for gate in report.gates:
        assert gate.name in page.text
        assert gate.reason in page.text
    for target in report.targets:
        assert target.name in page.text
        for note in target.notes:
            assert note in page.text
    for step in report.steps:
        for skip in step.skipped:
            assert skip.path in page.text
            assert skip.reason in page.text
    assert "0.000000" not in page.text


def test_a_bare_report_renders_too(report: Report) -> None:
    bare = report.model_copy(update={"steps": [], "targets": [], "gates": [], "samples": [], "verdict": "not_measured"})
    assert "exported as it is" in html.render(bare)
