from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.measure import (
    answers_of,
    as_record,
    judge_gates,
    outputs_of,
    quality_of,
    refuse_unsteady,
    sampling,
    slower,
    value_of,
)
from enginewright.pipeline import exit_code, unmeasured, verdict
from enginewright.progress import Progress
from enginewright.recipe import Validation
from enginewright.reports import record as records
from enginewright.reports.record import Fidelity, Gate, Latency, Quality, TargetRecord
from enginewright.validation.contract import Drawn, SampleMetric, SamplingTask
from enginewright.validation.fidelity import OutputFidelity
from enginewright.validation.gates import parse
from enginewright.validation.latency import summarise
from tests.reports.example import example_report

KNOWN = [
    "fidelity.relative_l2",
    "fidelity.cosine",
    "fidelity.max_abs",
    "fidelity.snr_db",
    "quality.judged_as_asked",
    "latency.ratio",
]


def target(**more: object) -> TargetRecord:
    fields = {"installed": True, "importable": True, "buildable": True, "runnable": True, "built": True}
    return TargetRecord(name="onnxruntime", parameters={}, **{**fields, **more})  # type: ignore[arg-type]


def output(name: str, cosine: float, error: float) -> Fidelity:
    return Fidelity(output=name, max_abs=error, mean_abs=error, relative_l2=error, cosine=cosine, snr_db=20)


def test_a_gate_sees_the_worst_output() -> None:
    found = target(fidelity=[output("a", 0.9, 3), output("b", 0.99, 1)])
    assert value_of("fidelity.cosine", found) == (0.9, "")
    assert value_of("fidelity.max_abs", found) == (3, "")
    gate = judge_gates([parse("fidelity.cosine >= 0.95", known=KNOWN)], [found])[0]
    assert (gate.verdict, gate.target, gate.value) == ("missed", "onnxruntime", 0.9)


def test_equal_outputs_have_an_infinite_ratio_which_is_null_in_the_record_and_meets_any_bound() -> None:
    worst = {"max_abs": 0.0, "mean_abs": 0.0, "relative_l2": 0.0, "cosine": 1.0, "snr_db": float("inf")}
    found = target(fidelity=[as_record(OutputFidelity(output="a", worst=worst))])
    assert found.fidelity[0].snr_db is None
    assert judge_gates([parse("fidelity.snr_db >= 90", known=KNOWN)], [found])[0].verdict == "met"


def test_a_faulty_engine_meets_no_gate_and_says_why() -> None:
    found = target(faults=["output 'y' holds 3 NaN; first in layer a.b"], fidelity=[])
    gate = judge_gates([parse("fidelity.cosine >= 0", known=KNOWN)], [found])[0]
    assert gate.verdict == "not_measured"
    assert "layer a.b" in gate.reason


def test_what_does_not_run_here_is_not_measured_when_asked_by_name_and_left_out_otherwise() -> None:
    absent = target(runnable=False, reason="not runnable: no GPU")
    gate = judge_gates([parse("onnxruntime: latency.ratio <= 1", known=KNOWN)], [absent])[0]
    assert (gate.verdict, gate.reason) == ("not_measured", "not runnable: no GPU")
    gate = judge_gates([parse("latency.ratio <= 1", known=KNOWN)], [absent])[0]
    assert (gate.verdict, gate.target) == ("not_measured", "any")


def test_a_model_without_a_sampling_task_has_no_quality_to_gate_on() -> None:
    found = target(fidelity=[output("a", 1, 0)])
    gate = judge_gates([parse("quality.judged_as_asked >= 0.9", known=KNOWN)], [found])[0]
    assert (gate.verdict, gate.reason) == ("not_measured", "the model has no sampling task")


def test_quality_that_cannot_be_measured_keeps_its_reason() -> None:
    class Broken(SampleMetric):
        higher_is_better = True

        def measure(self, task: SamplingTask, original: Drawn, candidate: Drawn) -> float:
            from enginewright.ground.errors import ToolchainError

            raise ToolchainError("too few samples: 3 of 200")

    drawn = Drawn(pictures=np.zeros((1, 1, 2, 2)), classes=np.zeros(1), features=np.zeros((1, 2)))
    found: Quality = quality_of(Broken(), "broken", None, drawn, drawn)  # type: ignore[arg-type]
    assert (found.value, found.reason) == (None, "too few samples: 3 of 200")


def test_a_slower_engine_is_said_to_be_slower() -> None:
    summary = summarise([0.010, 0.011] * 10, [0.020, 0.021] * 10, seed=0)
    assert "slower than the original" in slower(summary)[0]
    assert slower(summarise([0.02] * 20, [0.01] * 20, seed=0)) == []


def test_sampling_starts_every_runner_from_the_same_noise() -> None:
    seeds: list[tuple[int, int]] = []

    def sample(runner: object, n: int, seed: int) -> np.ndarray:
        seeds.append((n, seed))
        return np.zeros((n, 1, 4, 4)) + (runner is ours)

    ours, original = lambda inputs: inputs, lambda inputs: inputs
    features = np.random.default_rng(0).standard_normal((50, 2))
    task = SamplingTask(
        sample=sample,
        asked=lambda n: np.zeros(n),
        read=lambda pictures: (np.zeros(len(pictures)), features[: len(pictures)]),
        real=features,
        real_again=features,
        samples=10,
        floor=5,
    )
    settings = Validation(samples=7)
    quality, shown = sampling(task, original, {"ours": ours}, settings, seed=3, progress=Progress(quiet=True))
    assert seeds == [(7, 3), (7, 3)]
    figures = {figure.name: figure.value for figure in quality["ours"]}
    assert figures["judged_as_asked"] == 1
    assert figures["psnr_db"] == pytest.approx(10 * np.log10(4 / 1))
    assert shown[0].target == "ours"
    assert shown[0].original_png != shown[0].candidate_png


def test_one_output_equal_and_one_not_is_no_crash() -> None:
    equal = as_record(OutputFidelity(output="a", worst=FIGURES | {"snr_db": math.inf}))
    found = target(fidelity=[equal, output("b", 0.9, 1)])
    assert value_of("fidelity.snr_db", found) == (20, "")
    assert value_of("fidelity.worst_column", found)[0] is None  # an older report has none: not measured, not 0


FIGURES = {"max_abs": 0.0, "mean_abs": 0.0, "relative_l2": 0.0, "cosine": 1.0, "snr_db": 0.0, "worst_column": 0.0}


def test_an_original_of_zeros_is_no_equal_output() -> None:
    """Minus infinity is the worst of ratios; as null it would have read as equality, and met every bound."""
    worst = FIGURES | {"relative_l2": math.inf, "snr_db": -math.inf}
    found = target(fidelity=[as_record(OutputFidelity(output="a", worst=worst))])
    gates = [parse(text, known=KNOWN) for text in ("fidelity.snr_db >= 90", "fidelity.relative_l2 <= 1e300")]
    assert [gate.verdict for gate in judge_gates(gates, [found])] == ["missed", "missed"]


def test_infinite_figures_are_written_read_and_said(tmp_path: Path) -> None:
    from enginewright.reports import html, markdown

    report = example_report()
    worst = FIGURES | {"relative_l2": math.inf, "worst_column": math.inf, "snr_db": -math.inf}
    report.targets[0].fidelity = [as_record(OutputFidelity(output="mask", worst=worst))]
    report.gates = [
        Gate(name="fidelity.snr_db", target="onnxruntime", bound=">= 1e+300", verdict="met", value=math.inf)
    ]
    records.write(report, tmp_path / "report.json")
    assert records.read(tmp_path / "report.json") == report
    for page in (html.render(report), markdown.render(report)):
        assert "infinite" in page
        assert "is 0 in the original and not in the engine" in page.replace("\\_", "_")


def timed(ratio: float, low: float, high: float, **more: object) -> Latency:
    fields = example_report().targets[0].latency.model_dump()  # type: ignore[union-attr]
    return Latency.model_validate({**fields, "ratio": ratio, "ratio_low": low, "ratio_high": high, **more})


@pytest.mark.parametrize(
    ("low", "high", "unsafe", "found"),
    [
        (0.4, 0.6, [], "met"),
        (0.4, 1.1, [], "inconclusive"),
        (1.1, 1.3, [], "missed"),
        (0.4, 0.6, ["other programs interrupted the original"], "inconclusive"),
        (1.1, 1.3, ["other programs interrupted the original"], "inconclusive"),
    ],
)
def test_a_speed_gate_is_judged_by_its_interval_and_by_no_unsafe_figure(
    low: float, high: float, unsafe: list[str], found: str
) -> None:
    measured = target(latency=timed((low + high) / 2, low, high, unsafe=unsafe), fidelity=[output("a", 1, 0)])
    gates = judge_gates([parse("latency.ratio <= 1", known=KNOWN)], [measured])
    assert gates[0].verdict == found
    report = example_report().model_copy(
        update={"gates": gates, "targets": [measured], "verdict": verdict(gates, [measured])}
    )
    assert report.verdict == found
    assert exit_code(report) == {"met": 0, "missed": 1, "inconclusive": 3}[found]


def test_the_stalled_original_of_a_busy_machine_meets_no_gate() -> None:
    """80 ms where it takes 0.02 ms, in every call: a tiny and steady ratio that the old judge called met."""
    from enginewright.validation.latency import Samples

    rng = np.random.default_rng(0)
    walls = [float(each) for each in rng.normal(0.08, 0.002, 30)]
    stalled = Samples(wall_s=walls, cpu_s=walls, interrupted=[20] * 30)
    quick = [float(each) for each in rng.normal(2e-5, 5e-7, 30)]
    found = summarise(stalled, Samples(wall_s=quick, cpu_s=quick, interrupted=[0] * 30), seed=0)
    assert found.ratio_high < 0.05
    measured = target(latency=timed(found.ratio, found.ratio_low, found.ratio_high, unsafe=found.unsafe))
    assert judge_gates([parse("latency.ratio <= 0.05", known=KNOWN)], [measured])[0].verdict == "inconclusive"


def test_met_is_not_said_over_a_required_target_that_was_not_measured() -> None:
    good, absent = target(fidelity=[output("a", 1, 0)]), target(runnable=False, reason="no GPU")
    gates = judge_gates([parse("fidelity.cosine >= 0.9", known=KNOWN)], [good, absent])
    assert [gate.verdict for gate in gates] == ["met"]
    report = example_report().model_copy(update={"gates": gates, "targets": [good, absent]})
    report.verdict = verdict(gates, report.targets)
    assert (report.verdict, exit_code(report), unmeasured(report.targets)) == ("not_measured", 3, ["onnxruntime"])
    absent.optional = True
    report.verdict = verdict(gates, report.targets)
    assert (report.verdict, exit_code(report)) == ("met", 0)


def test_an_empty_output_is_compared_on_nothing_and_meets_nothing() -> None:
    call, nothing = {"x": np.ones(1)}, {"y": np.zeros((0, 3), np.float32)}
    found = target(**outputs_of(lambda inputs: dict(nothing), [call], [nothing]))
    assert found.fidelity == []
    gate = judge_gates([parse("fidelity.cosine >= 0.9", known=KNOWN)], [found])[0]
    assert (gate.verdict, gate.reason) == ("not_measured", "output 'y' is empty in every call: nothing was compared")
    both = nothing | {"z": np.ones((2, 2), np.float32)}
    found = target(**outputs_of(lambda inputs: dict(both), [call], [both]))
    assert [each.output for each in found.fidelity] == ["z"]
    assert found.not_compared == ["output 'y' is empty in every call"]


def test_a_dead_column_is_a_fault() -> None:
    original = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    fields = outputs_of(lambda inputs: {"y": original * np.float32([1, 0, 1])}, [{}], [{"y": original}])
    assert "dead columns: 1 (1 of 3" in fields["faults"][0]
    assert verdict([], [target(**fields)]) == "missed"


def test_figures_are_over_the_rows_that_a_mask_keeps_and_over_all_of_them() -> None:
    from enginewright.reports import markdown

    original = np.random.default_rng(0).normal(size=(2, 4, 3))
    engine = original + 1e-6
    engine[1, 2:] = 9
    calls = [{"ids": np.ones((2, 4)), "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]])}]
    fields = outputs_of(lambda inputs: {"y": engine}, calls, [{"y": original}], mask="attention_mask")
    found = target(**fields)
    assert found.fidelity[0].mask == "attention_mask"
    assert judge_gates([parse("fidelity.relative_l2 <= 1e-5", known=KNOWN)], [found])[0].verdict == "met"
    report = example_report().model_copy(update={"targets": [found]})
    assert "over the rows that attention_mask keeps; over all rows" in markdown.render(report).replace("\\", "")


class Steps:
    """Answers with the next of some values, over and over."""

    def __init__(self, *values: float) -> None:
        self.values, self.count = values, 0

    def __call__(self, inputs: object) -> dict[str, np.ndarray]:
        self.count += 1
        return {"y": np.full((2, 3), self.values[self.count % len(self.values)])}


def test_an_original_that_answers_one_call_in_two_ways_is_no_reference() -> None:
    with pytest.raises(ToolchainError, match=r"output 'y' of one and the same call differs by .* draws random numbers"):
        refuse_unsteady(Steps(1.0, 2.0), {})
    refuse_unsteady(Steps(1.0, 1.0 + 1e-7), {})  # the order of additions


def test_an_original_that_is_not_finite_in_validation_is_not_the_engines_fault() -> None:
    with pytest.raises(ToolchainError, match=r"cannot be a reference: .* in validation call 2"):
        answers_of(Steps(math.inf, 1.0), [{}, {}])
