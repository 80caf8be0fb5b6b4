import copy
import json
from functools import partial

import numpy as np
import pytest

from enginewright.ground import writing
from enginewright.ground.errors import ToolchainError
from enginewright.reports import record as record_file
from enginewright.reports.record import Report
from enginewright.validation import latency, regression
from enginewright.validation.latency import summarise
from enginewright.validation.regression import (
    Tolerance,
    baseline_from,
    check,
    figures_from,
    left_out,
    read,
    render_table,
    write,
)
from enginewright.validation.statistics import bootstrap_median, bootstrap_ratio

LATENCY = {"ratio": 0.8, "ratio_low": 0.78, "ratio_high": 0.82, "threads": 2}
RECORD = {
    "schema": 1,
    "model": {"name": "dit:digits", "weights": "shipped", "parameter_count": 1000, "macs": 5000, "bytes": 4000},
    "steps": [
        {
            "name": "prune_heads",
            "parameter_count": {"before": 1000, "after": 800},
            "macs": {"before": 5000, "after": 4000},
            "bytes": {"before": 4000, "after": 3200},
        }
    ],
    "targets": [
        {
            "name": "onnxruntime",
            "reason": "",
            "bytes": 10_000,
            "fidelity": [
                {
                    "output": "velocity",
                    "max_abs": 0.1,
                    "mean_abs": 0.02,
                    "relative_l2": 0.04,
                    "cosine": 0.999,
                    "snr_db": 28.0,
                }
            ],
            "quality": [
                {"name": "judged_as_asked", "value": 0.98, "higher_is_better": True, "reason": ""},
                {"name": "frechet_ratio", "value": 2.0, "higher_is_better": False, "reason": ""},
                {"name": "psnr_db", "value": None, "higher_is_better": True, "reason": "no samples asked"},
            ],
            "latency": LATENCY,
        },
        {"name": "tensorrt", "reason": "no GPU here", "bytes": None, "fidelity": [], "quality": [], "latency": None},
    ],
    "environment": {"cpu": "Some Xeon", "gpu": None, "os": "Linux"},
}
KEYS = {
    "model/parameter_count",
    "model/macs",
    "model/bytes",
    "onnxruntime/bytes",
    "onnxruntime/fidelity.max_abs/velocity",
    "onnxruntime/fidelity.mean_abs/velocity",
    "onnxruntime/fidelity.relative_l2/velocity",
    "onnxruntime/fidelity.cosine/velocity",
    "onnxruntime/quality.judged_as_asked",
    "onnxruntime/quality.frechet_ratio",
    "onnxruntime/latency.ratio",
}

ONE_FIGURE = '{"schema": 1, "model": "m", "figures": {"a": {%s, "higher_is_better": true}}}'


@pytest.fixture
def record():
    return copy.deepcopy(RECORD)


def compared(record, baseline=None):
    """Key -> comparison with the baseline of the unchanged record."""
    return {each.key: each for each in check(baseline or baseline_from(RECORD), record)}


def place(record, key):
    """(container, key in it) of a figure's value in the record."""
    ours = record["targets"][0]
    kind, _, output = key.partition("/")[2].partition("/")
    if key.startswith("model/"):
        return record["steps"][-1][kind], "after"
    if output:
        return ours["fidelity"][0], kind.removeprefix("fidelity.")
    if kind.startswith("quality."):
        return next(each for each in ours["quality"] if f"quality.{each['name']}" == kind), "value"
    return (ours["latency"], "ratio") if kind == "latency.ratio" else (ours, kind)


class TestFiguresFrom:
    def test_keys_values_and_directions(self):
        figures = figures_from(RECORD)
        assert set(figures) == KEYS
        assert figures["model/parameter_count"].value == 800
        assert figures["onnxruntime/fidelity.cosine/velocity"].value == 0.999
        assert {key for key, figure in figures.items() if figure.higher_is_better} == {
            "onnxruntime/fidelity.cosine/velocity",
            "onnxruntime/quality.judged_as_asked",
        }

    def test_without_steps_the_model_itself_is_counted(self, record):
        record["steps"] = []
        assert figures_from(record)["model/parameter_count"].value == 1000

    def test_the_last_step_counts(self, record):
        last = {key: {"before": 800, "after": 700} for key in ("parameter_count", "macs", "bytes")}
        record["steps"].append({"name": "prune_widths", **last})
        assert figures_from(record)["model/parameter_count"].value == 700

    def test_a_record_as_it_is_written(self, tmp_path):
        """The layout is the record's to choose; this goes red when the two part."""
        latency = LATENCY | {
            "samples_s": [0.8],
            "original_samples_s": [1.0],
            "median_s": 0.8,
            "p90_s": 0.8,
            "p99_s": 0.8,
        }
        latency |= {"original_median_s": 1.0, "spread": 0.0, "warm_up": 1, "shapes": {}, "warnings": []}
        parts = {"plan_digest": "", "parameters": {}, "changed": [], "skipped": [], "seconds": 1.0}
        answers = dict.fromkeys(("installed", "importable", "buildable", "runnable", "built"), True)
        report = Report.model_validate(
            {
                "model": RECORD["model"],
                "verdict": "met",
                "steps": [step | parts for step in RECORD["steps"]],
                "targets": [RECORD["targets"][0] | answers | {"parameters": {}, "latency": latency}],
                "gates": [],
                "environment": RECORD["environment"],
                "seconds": 1.0,
            }
        )
        record_file.write(report, tmp_path / "report.json")
        written = json.loads((tmp_path / "report.json").read_text())
        assert figures_from(written) == figures_from(RECORD)
        assert {each.verdict for each in compared(written).values()} == {"same"}

    def test_what_was_not_measured_is_absent_never_zero(self, record):
        record["steps"][0]["macs"]["after"] = None
        assert set(figures_from(record)) == KEYS - {"model/macs"}

    def test_two_targets_of_one_name_stay_apart(self, record):
        record["targets"].append({**record["targets"][0], "bytes": 77})
        figures = figures_from(record)
        assert figures["onnxruntime/bytes"].value == 10_000
        assert figures["onnxruntime#2/bytes"].value == 77

    def test_a_value_that_the_record_spells_as_a_word(self, record):
        record["targets"][0]["quality"][1]["value"] = "Infinity"
        assert figures_from(record)["onnxruntime/quality.frechet_ratio"].value == float("inf")


class TestCheck:
    def test_the_same_run_is_the_same(self):
        assert {each.verdict for each in compared(RECORD).values()} == {"same"}
        assert set(compared(RECORD)) == KEYS

    @pytest.mark.parametrize(
        ("key", "value", "verdict"),
        [
            ("model/parameter_count", 801, "regressed"),
            ("model/parameter_count", 799, "improved"),
            ("model/macs", 4001, "regressed"),
            ("model/bytes", 3263, "same"),
            ("model/bytes", 3265, "regressed"),
            ("onnxruntime/bytes", 10_201, "regressed"),
            ("onnxruntime/bytes", 9_799, "improved"),
            ("onnxruntime/fidelity.max_abs/velocity", 0.124, "same"),
            ("onnxruntime/fidelity.max_abs/velocity", 0.126, "regressed"),
            ("onnxruntime/fidelity.mean_abs/velocity", 0.014, "improved"),
            ("onnxruntime/fidelity.relative_l2/velocity", 0.051, "regressed"),
            ("onnxruntime/fidelity.cosine/velocity", 0.99891, "same"),
            ("onnxruntime/fidelity.cosine/velocity", 0.99889, "regressed"),
            ("onnxruntime/fidelity.cosine/velocity", 0.9999, "improved"),
            ("onnxruntime/quality.judged_as_asked", 0.96, "same"),
            ("onnxruntime/quality.judged_as_asked", 0.95, "regressed"),
            ("onnxruntime/quality.frechet_ratio", 2.6, "regressed"),
            ("onnxruntime/quality.frechet_ratio", 1.4, "improved"),
            ("onnxruntime/latency.ratio", 0.84, "same"),
            ("onnxruntime/latency.ratio", 0.85, "regressed"),
            ("onnxruntime/latency.ratio", 0.55, "improved"),
            ("onnxruntime/fidelity.cosine/velocity", float("nan"), "regressed"),
            ("onnxruntime/fidelity.max_abs/velocity", float("nan"), "regressed"),
            ("onnxruntime/fidelity.max_abs/velocity", float("inf"), "regressed"),
        ],
    )
    def test_each_direction(self, record, key, value, verdict):
        holder, name = place(record, key)
        holder[name] = value
        if name == "ratio":
            holder |= {"ratio_low": value - 0.002, "ratio_high": value + 0.02}
        found = compared(record)
        assert found[key].verdict == verdict
        assert found[key].failed == (verdict == "regressed")
        assert found[key].baseline == figures_from(RECORD)[key].value
        assert {each.verdict for other, each in found.items() if other != key} == {"same"}

    def test_a_nan_is_called_one(self, record):
        record["targets"][0]["fidelity"][0]["cosine"] = "NaN"
        assert compared(record)["onnxruntime/fidelity.cosine/velocity"].reason == "not a number"

    def test_errors_at_the_order_of_additions_are_the_same(self, record):
        for run, error in ((record, 1e-7), (then := copy.deepcopy(RECORD), 8e-6)):
            run["targets"][0]["fidelity"][0]["max_abs"] = error
        assert compared(then, baseline_from(record))["onnxruntime/fidelity.max_abs/velocity"].verdict == "same"

    def test_a_figure_that_is_gone_fails_with_the_reason_in_the_record(self, record):
        ours = record["targets"][0]
        ours["quality"][0] |= {"value": None, "reason": "0 samples were drawn"}
        ours |= {"fidelity": [], "latency": None, "reason": "could not be loaded"}
        found = compared(record)
        gone = {key for key, each in found.items() if each.verdict == "missing"}
        assert gone == {key for key in KEYS if "fidelity" in key or "latency" in key or "judged" in key}
        assert all(found[key].failed for key in gone)
        assert found["onnxruntime/quality.judged_as_asked"].reason == "0 samples were drawn"
        assert found["onnxruntime/latency.ratio"].reason == "could not be loaded"

    def test_a_target_that_is_gone_fails(self, record):
        record["targets"] = record["targets"][1:]
        found = compared(record)
        assert found["onnxruntime/bytes"].verdict == "missing"
        assert found["onnxruntime/bytes"].reason == "not in this run"

    def test_a_figure_that_the_baseline_lacks_is_new_and_no_failure(self, record):
        record["targets"][0]["quality"][2]["value"] = 30.0
        new = compared(record)["onnxruntime/quality.psnr_db"]
        assert (new.verdict, new.baseline, new.current, new.failed) == ("new", None, 30.0, False)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"cpu": "Other Xeon"}, "another CPU: Some Xeon then, Other Xeon now"),
            ({"gpu": "H100"}, "another GPU: None then, H100 now"),
            ({"cpu": None}, "the CPU model is not recorded on both sides"),
        ],
    )
    def test_latency_of_another_machine_is_not_compared(self, record, change, reason):
        record["environment"] |= change
        found = compared(record)
        latency = found.pop("onnxruntime/latency.ratio")
        assert (latency.verdict, latency.reason, latency.failed) == ("not_comparable", reason, False)
        assert {each.verdict for each in found.values()} == {"same"}

    def test_latency_with_other_threads_is_not_compared_even_when_far_off(self, record):
        record["targets"][0]["latency"] |= {"threads": 8, "ratio": 3.0}
        latency = compared(record)["onnxruntime/latency.ratio"]
        assert (latency.verdict, latency.reason) == ("not_comparable", "another number of threads: 2 then, 8 now")

    def test_latency_on_another_device_is_not_compared(self, record):
        record["targets"][0]["latency"] |= {"device": "cuda:0", "original_device": "cuda:0"}
        latency = compared(record)["onnxruntime/latency.ratio"]
        assert (latency.verdict, latency.reason) == ("not_comparable", "another device: cpu then, cuda:0 now")
        assert compared(record, baseline_from(record))["onnxruntime/latency.ratio"].verdict == "same"

    def test_a_slower_ratio_whose_interval_reaches_what_is_allowed_is_no_failure(self, record):
        latency = record["targets"][0]["latency"]
        latency |= {"ratio": 1.5, "ratio_low": 0.83, "ratio_high": 1.9}
        found = compared(record)["onnxruntime/latency.ratio"]
        assert (found.verdict, found.failed) == ("not_comparable", False)
        assert found.reason == "its interval, 0.83 to 1.9, reaches the allowed 0.845"
        latency["ratio_low"] = 0.85
        assert compared(record)["onnxruntime/latency.ratio"].verdict == "regressed"

    def test_worse_fidelity_in_other_8_bit_arithmetic_is_not_compared(self, record):
        baseline = copy.deepcopy(RECORD)
        baseline["environment"]["int8_saturates"] = False
        record["environment"]["int8_saturates"] = True
        record["targets"][0]["fidelity"][0]["cosine"] = 0.9
        record["targets"][0]["bytes"] = 20_000
        found = compared(record, baseline_from(baseline))
        cosine = found["onnxruntime/fidelity.cosine/velocity"]
        reason = "8-bit arithmetic here saturates, the baseline's does not saturate; gates still hold it"
        assert (cosine.verdict, cosine.reason, cosine.failed) == ("not_comparable", reason, False)
        assert found["onnxruntime/bytes"].verdict == "regressed"
        record["environment"]["int8_saturates"] = False
        assert compared(record, baseline_from(baseline))[cosine.key].verdict == "regressed"

    def test_the_tolerance_and_direction_of_the_baseline_count(self, record):
        content = baseline_from(RECORD).model_dump(by_alias=True)
        figure = content["figures"]["onnxruntime/bytes"]
        figure["tolerance"], figure["higher_is_better"] = {"relative": 0.5}, True
        record["targets"][0]["bytes"] = 5_001
        edited = regression.Baseline.model_validate(content)
        assert compared(record, edited)["onnxruntime/bytes"].verdict == "same"
        record["targets"][0]["bytes"] = 4_999
        assert compared(record, edited)["onnxruntime/bytes"].verdict == "regressed"

    def test_another_model_is_refused(self, record):
        record["model"]["name"] = "dit:other"
        with pytest.raises(ToolchainError, match="of 'dit:digits', the report of 'dit:other'"):
            check(baseline_from(RECORD), record)

    def test_bad_news_comes_first(self, record):
        record["targets"][0]["bytes"] = 20_000
        record["targets"][0]["latency"] = None
        assert [each.verdict for each in check(baseline_from(RECORD), record)][:3] == ["regressed", "missing", "same"]

    def test_a_ratio_that_is_no_number_fails_whatever_the_interval_and_the_machine(self, record):
        for end in ("ratio", "ratio_low"):
            broken = copy.deepcopy(record)
            broken["targets"][0]["latency"][end] = float("nan")
            broken["environment"]["cpu"] = "Other Xeon"
            found = compared(broken)["onnxruntime/latency.ratio"]
            assert (found.verdict, found.reason) == ("regressed", "not a number")

    def test_an_unsafe_ratio_is_no_figure_and_no_verdict(self, record):
        record["targets"][0]["latency"] |= {"unsafe": ["other programs interrupted the engine"], "ratio": 9.0}
        assert "onnxruntime/latency.ratio" not in figures_from(record)
        found = compared(record)["onnxruntime/latency.ratio"]
        assert (found.verdict, found.failed) == ("not_comparable", False)
        assert found.reason == "other programs interrupted the engine"
        written = baseline_from(record)
        assert "onnxruntime/latency.ratio" not in written.figures
        assert left_out(record)["onnxruntime/latency.ratio"] == "other programs interrupted the engine"
        assert left_out(RECORD) == {}

    def test_same_is_not_said_of_intervals_that_could_hide_a_tenth(self, record):
        record["targets"][0]["latency"] |= {"ratio_low": 0.72, "ratio_high": 0.88}
        found = compared(record)["onnxruntime/latency.ratio"]
        assert (found.verdict, found.failed) == ("not_comparable", False)
        assert "too wide to tell: a slow-down below 17% could not be seen" in found.reason

    def test_a_wide_tolerance_set_by_hand_asks_for_no_narrow_interval(self, record):
        content = baseline_from(RECORD).model_dump(by_alias=True)
        content["figures"]["onnxruntime/latency.ratio"]["tolerance"] = {"relative": 1.0}
        record["targets"][0]["latency"] |= {"ratio_low": 0.72, "ratio_high": 0.88}
        edited = regression.Baseline.model_validate(content)
        assert compared(record, edited)["onnxruntime/latency.ratio"].verdict == "same"

    @pytest.mark.parametrize(
        ("part", "now", "reason"),
        [
            ("cpu_id", "family 6", "another CPU: family 25 then, family 6 now"),
            ("cores", 64, "another number of cores: 2 then, 64 now"),
        ],
    )
    def test_a_name_is_not_all_of_a_processor(self, record, part, now, reason):
        then = copy.deepcopy(RECORD)
        then["environment"] |= {"cpu_id": "family 25", "cores": 2}
        record["environment"] |= {"cpu_id": "family 25", "cores": 2, part: now}
        assert compared(record, baseline_from(then))["onnxruntime/latency.ratio"].reason == reason
        assert "not recorded on both sides" in compared(record)["onnxruntime/latency.ratio"].reason

    def test_a_slow_down_of_engine_and_original_alike_is_seen(self, record):
        """The ratio cancels it: one more block in the model, say."""
        times = {"original_median_s": 0.01, "original_low_s": 0.0099, "original_high_s": 0.0101}
        then = copy.deepcopy(RECORD)
        then["targets"][0]["latency"] |= times
        record["targets"][0]["latency"] |= {name: 1.2 * value for name, value in times.items()}
        found = compared(record, baseline_from(then))
        assert found["onnxruntime/latency.ratio"].verdict == "same"
        assert found["onnxruntime/latency.original_median_s"].verdict == "regressed"
        record["environment"]["cpu"] = "Other Xeon"
        assert (
            compared(record, baseline_from(then))["onnxruntime/latency.original_median_s"].verdict == "not_comparable"
        )

    def test_times_of_other_inputs_are_not_compared(self, record):
        then = copy.deepcopy(RECORD)
        then["targets"][0]["latency"]["shapes"] = {"x": [2, 4]}
        record["targets"][0]["latency"]["shapes"] = {"x": [8, 4]}
        found = compared(record, baseline_from(then))["onnxruntime/latency.ratio"]
        assert (found.verdict, found.reason) == (
            "not_comparable",
            "other inputs: {'x': [2, 4]} then, {'x': [8, 4]} now",
        )

    def test_a_model_that_became_worse_is_seen_though_its_engine_is_as_near_as_ever(self, record):
        then = copy.deepcopy(RECORD)
        for run, accuracy in ((then, 0.98), (record, 0.9)):
            run["targets"][0]["quality"][0]["original"] = accuracy
        found = compared(record, baseline_from(then))
        assert found["onnxruntime/quality.judged_as_asked/original"].verdict == "regressed"
        assert found["onnxruntime/quality.judged_as_asked"].verdict == "same"

    def test_a_figure_of_the_users_own(self):
        given = dict([regression.figure_given("accuracy=0.913"), regression.figure_given("wer=0.2,lower")])
        baseline = baseline_from(RECORD, given=given)
        worse = dict([regression.figure_given("accuracy=0.8"), regression.figure_given("wer=0.1,lower")])
        found = {each.key: each for each in check(baseline, RECORD, worse)}
        assert found["given/accuracy"].verdict == "regressed"
        assert found["given/wer"].verdict == "improved"
        gone = {each.key: each for each in check(baseline, RECORD)}["given/accuracy"]
        assert (gone.verdict, gone.reason) == ("missing", "give it again: --figure accuracy=NUMBER")

    @pytest.mark.parametrize("text", ["accuracy", "=0.9", "accuracy=high", "accuracy=nan", "accuracy=0.9,upper"])
    def test_what_is_no_figure_is_quoted(self, text):
        with pytest.raises(ToolchainError, match=f"'{text}' is no figure"):
            regression.figure_given(text)


def timed_run(rng, slowdown):
    """A record of a run on a quiet machine: 2 % noise a call, and 0.5 % between runs that no sample shows."""
    drift = 1 + 0.1 * rng.random((10, 1))  # what the machine does to a round it does to both
    original, engine = (drift * rng.lognormal(0, 0.02, (10, 3)) for _ in range(2))
    engine = 0.7 * slowdown * rng.lognormal(0, 0.005) * engine
    found = summarise(original.ravel(), engine.ravel(), seed=0)
    record = copy.deepcopy(RECORD)
    record["targets"][0]["latency"] |= {
        "ratio": found.ratio,
        "ratio_low": found.ratio_low,
        "ratio_high": found.ratio_high,
        "unsafe": found.unsafe,
    }
    return record


def test_a_tenth_slower_is_seen_and_no_change_is_no_alarm(monkeypatch):
    """The promise of the tolerance, on drawn samples: more than 95 % of slow-downs, fewer than 2 % false alarms."""
    monkeypatch.setattr(latency, "bootstrap_ratio", partial(bootstrap_ratio, resamples=400))
    monkeypatch.setattr(latency, "bootstrap_median", partial(bootstrap_median, resamples=4))
    rng = np.random.default_rng(0)
    verdicts = {1.0: [], 1.1: []}
    for slowdown, seen in verdicts.items():
        for _ in range(200):
            baseline, record = baseline_from(timed_run(rng, 1.0)), timed_run(rng, slowdown)
            seen.append(compared(record, baseline)["onnxruntime/latency.ratio"].verdict)
    assert verdicts[1.0].count("regressed") < 0.02 * 200
    assert verdicts[1.1].count("regressed") > 0.95 * 200
    assert verdicts[1.0].count("same") > 0.9 * 200


class TestTolerance:
    def test_the_wider_of_the_two_counts(self):
        both = Tolerance(relative=0.1, absolute=1)
        assert both.allowed(-20.0) == 2.0
        assert both.allowed(5.0) == 1.0
        assert Tolerance(absolute=0).allowed(1e9) == 0

    def test_in_words(self):
        assert str(Tolerance(relative=0.25, absolute=1e-5)) == "25 % or 1e-05"
        assert str(Tolerance(absolute=0)) == "exact"


class TestFile:
    def test_written_and_read_again(self, tmp_path):
        path = tmp_path / "dit.json"
        write(path, baseline_from(RECORD))
        assert read(path) == baseline_from(RECORD)
        assert [file.name for file in tmp_path.iterdir()] == ["dit.json"]
        content = json.loads(path.read_text())
        assert content["schema"] == 1
        assert content["figures"]["onnxruntime/latency.ratio"] == {
            "value": 0.8,
            "low": 0.78,
            "high": 0.82,
            "tolerance": {"relative": 0.03},
            "higher_is_better": False,
        }
        assert content["environment"]["latency_threads"] == {"onnxruntime": 2}

    def test_a_write_that_fails_leaves_the_old_file_whole(self, tmp_path, monkeypatch):
        path = tmp_path / "dit.json"
        path.write_text("old")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writing.os, "replace", full)
        with pytest.raises(ToolchainError, match="the disk is full"):
            write(path, baseline_from(RECORD))
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["dit.json"]

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(ToolchainError, match="cannot be written: its folder does not exist"):
            write(tmp_path / "nowhere" / "dit.json", baseline_from(RECORD))

    def test_tolerances_set_by_hand_survive_an_update(self, record):
        content = baseline_from(RECORD).model_dump(by_alias=True)
        content["figures"]["onnxruntime/bytes"]["tolerance"] = {"absolute": 5.0}
        record["targets"][0]["bytes"] = 123
        updated = baseline_from(record, keep=regression.Baseline.model_validate(content))
        assert updated.figures["onnxruntime/bytes"].value == 123
        assert updated.figures["onnxruntime/bytes"].tolerance == Tolerance(absolute=5)
        assert updated.figures["model/bytes"].tolerance == regression.BYTES

    def test_a_figure_that_is_not_finite_makes_no_baseline(self, record):
        record["targets"][0]["fidelity"][0]["cosine"] = float("nan")
        with pytest.raises(ToolchainError, match=r"fidelity\.cosine/velocity is nan"):
            baseline_from(record)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "bad.json is not JSON"),
            ("[]", "schema 'list'"),
            ('{"schema": 2}', "schema 2; this version reads 1"),
            ('{"schema": 1, "figures": {}}', "needs 'model'"),
            ('{"schema": 1, "model": "m", "figures": {}, "extra": 1}', "no setting 'extra'"),
            (ONE_FIGURE % '"value": NaN, "tolerance": {"absolute": 0}', "a is nan"),
            ('{"schema": 1, "model": "m", "figures": {}}', "holds no figures, so nothing could fail"),
            (
                ONE_FIGURE % '"value": 1, "high": Infinity, "tolerance": {"absolute": 0}',
                "a baseline holds finite figures",
            ),
            (ONE_FIGURE % '"value": 1, "tolerance": {}', "a tolerance needs 'absolute' or 'relative'"),
            (ONE_FIGURE % '"value": 1, "tolerance": {"relative": -1}', "relative is -1"),
        ],
    )
    def test_a_bad_file_is_named_and_said(self, tmp_path, text, message):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(ToolchainError) as caught:
            read(path)
        assert message in str(caught.value)
        assert "bad.json" in str(caught.value)

    def test_no_file(self, tmp_path):
        with pytest.raises(ToolchainError, match=r"no baseline at 'gone\.json'"):
            read(tmp_path / "gone.json")


class TestRenderTable:
    def test_aligned_with_totals(self, record):
        record["targets"][0] |= {"bytes": 20_000, "latency": None, "reason": "could not be loaded"}
        lines = render_table(check(baseline_from(RECORD), record)).splitlines()
        assert lines[0].split() == ["verdict", "figure", "baseline", "now", "change", "tolerance"]
        assert lines[1].split() == ["regressed", "onnxruntime/bytes", "10,000", "20,000", "+100.0%", "2", "%"]
        assert lines[2].split(maxsplit=4)[:4] == ["missing", "onnxruntime/latency.ratio", "0.8", "-"]
        assert lines[2].endswith("could not be loaded")
        assert lines[-1] == "1 regressed, 1 missing, 9 same"
        starts = {line.index(line.split()[1]) for line in lines[:-1]}
        assert len(starts) == 1

    def test_nothing(self):
        assert render_table([]).splitlines()[-1] == "nothing to compare"
