from __future__ import annotations

import numpy as np
import pytest

from reports.record import Fidelity, Quality, TargetRecord
from toolchain.measure import as_record, judge_gates, quality_of, sampling, slower, value_of
from toolchain.progress import Progress
from toolchain.recipe import Validation
from validation.contract import Drawn, SampleMetric, SamplingTask
from validation.fidelity import OutputFidelity
from validation.gates import parse
from validation.latency import summarise

KNOWN = ["fidelity.cosine", "fidelity.max_abs", "fidelity.snr_db", "quality.judged_as_asked", "latency.ratio"]


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
            from toolchain.errors import ToolchainError

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
