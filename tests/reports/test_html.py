from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from enginewright.reports import html, markdown, summary, terminal
from enginewright.reports.record import Report
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


def test_doubt_about_a_time_stands_at_the_top_and_not_only_below(report: Report) -> None:
    doubtful = report.model_copy(deep=True)
    timed = doubtful.targets[0].latency
    assert timed is not None
    timed.unsafe = ["other programs interrupted the original in 24 of 24 calls"]
    top = Page(head(doubtful)).text
    assert "inconclusive" in top
    assert timed.unsafe[0] in top
    assert "whether it is faster is open" in top
    assert "faster: 0.63" not in top
    assert "inconclusive" not in Page(head(report)).text


@pytest.mark.parametrize("other", ["cuda:0", "cpu"])
def test_where_engine_and_original_ran_stands_beside_every_ratio(report: Report, other: str) -> None:
    there = report.model_copy(deep=True)
    timed = there.targets[0].latency
    assert timed is not None
    timed.device, timed.original_device = "cuda:0", other
    timed.unsafe = [] if other == "cuda:0" else ["the ratio compares devices as well"]
    where = summary.devices(timed)
    assert Page(head(there)).text.count(where) == (2 if other == "cuda:0" else 1)
    assert where in Page(html.render(there)).text.partition("Time of one call")[2]
    assert where in markdown.render(there).replace("\\", "")
    assert any(where in block.text for block in terminal.blocks(there) if isinstance(block, terminal.Line))
    assert ("between devices" in Page(html.render(there)).text) == (other == "cpu")
    assert "cuda:0" not in html.render(report)


def head(report: Report) -> str:
    """The page from its title to its first section."""
    return html.render(report).partition("<main>")[2].partition('<section id="gates">')[0]


def test_an_inconclusive_verdict_has_a_look_of_its_own(report: Report) -> None:
    inconclusive = report.model_copy(update={"verdict": "inconclusive"})
    assert 'class="verdict verdict-inconclusive"' in html.render(inconclusive)


def test_a_required_target_that_was_not_measured_is_named_at_the_top(report: Report) -> None:
    said = "Not measured, and not optional: tensorrt_rtx."
    assert said in Page(html.render(report)).text
    optional = report.model_copy(deep=True)
    optional.targets[1].optional = True
    assert said not in Page(html.render(optional)).text


def test_the_page_says_what_engines_were_held_against(report: Report) -> None:
    untouched = report.model_copy(update={"validation": {"reference": "the untouched original"}})
    assert (
        "The untouched original and every engine that runs here got the same inputs."
        in Page(html.render(untouched)).text
    )
    rewritten = report.model_copy(update={"validation": {"reference": "the original as fold_adapters rewrote it"}})
    text = Page(html.render(rewritten)).text
    assert "The original as fold_adapters rewrote it and every engine" in text
    assert "What those steps intend is on both sides; a line of its own holds the untouched original" in text
    assert "untouched" not in Page(html.render(report)).text  # an older report does not say


def test_figures_over_real_rows_stand_above_those_over_all_rows(report: Report) -> None:
    masked = report.model_copy(deep=True)
    output = masked.targets[0].fidelity[0]
    output.mask, output.relative_l2 = "attention_mask", 1e-6
    output.everywhere = {
        "max_abs": 3.0,
        "mean_abs": 1.0,
        "relative_l2": 0.908,
        "cosine": 0.5,
        "snr_db": 1.0,
        "worst_column": 2.0,
    }
    output.calls, output.worst_call, output.median = 8, 3, {"relative_l2": 5e-7}
    text = Page(html.render(masked)).text
    assert (
        text.index("1.00e-06")
        < text.index("all rows, also those that attention_mask leaves out")
        < text.rindex("0.908")
    )
    assert "worst of 8 calls, call 3; median 5.00e-07" in text


def test_a_run_without_gates_that_was_measured_is_done_and_not_unmeasured(report: Report) -> None:
    page = Page(html.render(report.model_copy(update={"verdict": "not_measured", "gates": []})))
    assert "dit:digitsdone, no gates asked" in page.text.replace("•", "").replace("\n", "")
    bare = [target.model_copy(update={"fidelity": [], "latency": None}) for target in report.targets]
    page = Page(html.render(report.model_copy(update={"verdict": "not_measured", "gates": [], "targets": bare})))
    assert "done, no gates asked" not in page.text


def test_faster_is_said_with_the_time_beside_fp32(report: Report) -> None:
    quick = report.targets[0].model_copy(update={"fp32_ratio": 1.0917})
    text = " ".join(Page(html.render(report.model_copy(update={"targets": [quick]}))).text.split())
    assert "1.58x faster than the original in PyTorch (1.51x to 1.63x)" in text
    assert text.count("NOT faster than the same graph in fp32 in the same runtime: 1.09 of its time") >= 3
    assert "faster" not in re.sub(r"faster than the (original|same graph)|1.58x faster|engine is faster", "", text)


def test_the_size_is_what_must_be_copied_with_its_files(report: Report) -> None:
    files = {"engines/onnxruntime/dynamic.onnx": 2_000_000, "engines/onnxruntime/dynamic.safetensors": 3_000_000}
    update = {"files": files, "bytes": sum(files.values()), "folders": ["engines/onnxruntime"]}
    text = Page(html.render(report.model_copy(update={"targets": [report.targets[0].model_copy(update=update)]}))).text
    assert "copy engines/onnxruntime" in text
    assert "5.00 MB" in text
    assert all(path in text for path in files)


def test_a_model_without_samples_has_no_sections_about_them(report: Report, page: Page) -> None:
    ids = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    assert {"quality", "samples"} <= ids
    bare = [target.model_copy(update={"quality": []}) for target in report.targets]
    gates = [gate for gate in report.gates if not gate.name.startswith("quality")]
    plain = Page(html.render(report.model_copy(update={"targets": bare, "samples": [], "gates": gates})))
    ids = {attributes.get("id") for tag, attributes in plain.tags if tag == "section"}
    assert not {"quality", "samples"} & ids


def test_captions_stand_outside_what_scrolls(report: Report) -> None:
    for scroller in re.findall(r'<div class="scroll".*?</div>', html.render(report), re.DOTALL):
        assert "<caption" not in scroller
        (described,) = re.findall(r'aria-describedby="([^"]+)"', scroller)
        assert f'id="{described}"' in html.render(report)


def test_a_record_without_some_figures_over_all_rows_is_shown_without_them(report: Report) -> None:
    target = report.targets[0]
    [output, *_] = target.fidelity
    odd = output.model_copy(update={"everywhere": {"relative_l2": 0.5}, "mask": "m"})
    changed = report.model_copy(update={"targets": [target.model_copy(update={"fidelity": [odd]})]})
    text = Page(html.render(changed)).text
    assert "all rows, also those that m leaves out" in text
    assert "0.5" in text
