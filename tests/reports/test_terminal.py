from __future__ import annotations

import itertools

from enginewright.reports.terminal import Line, Rows, blocks
from tests.reports.example import example_report


def text_of(found: list[Line | Rows]) -> str:
    return "\n".join(
        block.text if isinstance(block, Line) else "\n".join(" ".join(row) for row in block.rows) for block in found
    )


def test_it_says_verdict_gates_speed_size_steps_and_doubts() -> None:
    report = example_report()
    report.targets[0].fp32_ratio = 1.09
    report.targets[0].folders = ["engines/onnxruntime"]
    text = text_of(blocks(report))
    assert text.startswith("✗ dit:digits: missed 1 of 3 gates")
    for wanted in (
        "copy engines/onnxruntime, 3.05 MB; 1.58x faster than the original in PyTorch (1.51x to 1.63x); NOT faster",
        "tensorrt_rtx: built; not measured: not runnable: no NVIDIA driver",
        "frechet_ratio <= 3",
        "prune_heads changed 6 layers, 11.4 MB -> 10.0 MB of weights",
        "doubt about onnxruntime: 1 of 24 samples",
    ):
        assert wanted in text, wanted
    assert "\\_" not in text
    assert "&lt;" not in text


def test_a_measured_run_without_gates_is_done_and_one_that_was_not_run_is_not() -> None:
    report = example_report().model_copy(update={"gates": [], "verdict": "not_measured"})
    assert text_of(blocks(report)).startswith("• dit:digits: done, no gates asked")
    unmeasured = report.model_copy(update={"targets": report.targets[1:]})
    assert text_of(blocks(unmeasured)).startswith("○ dit:digits: not measured")
    assert text_of(blocks(report.model_copy(update={"targets": []}))).startswith("• dit:digits: done, no targets asked")


def test_nothing_is_told_twice_as_a_gap() -> None:
    found = blocks(example_report().model_copy(update={"steps": [], "gates": []}))
    texts = [block.text if isinstance(block, Line) else "table" for block in found]
    assert not any(a == b == "" for a, b in itertools.pairwise(texts))
    assert texts[-1]
