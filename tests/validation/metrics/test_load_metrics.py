import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import enginewright.validation.metrics
from enginewright.validation.contract import OutputMetric, SampleMetric
from enginewright.validation.metrics import load_metrics
from enginewright.validation.metrics.worst_column import WorstColumn

METRICS = load_metrics()
OUTPUT = [metric for metric in METRICS.values() if isinstance(metric, OutputMetric)]


def test_every_file_is_a_metric_under_its_own_name():
    files = {file.stem for file in Path(enginewright.validation.metrics.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(METRICS) == files
    assert {name for name, metric in METRICS.items() if isinstance(metric, SampleMetric)} == {
        "psnr_db",
        "judged_as_asked",
        "frechet_distance",
        "frechet_ratio",
        "kid",
        "ssim",
    }


def test_a_metric_knows_its_direction_and_says_what_it_is():
    for metric in METRICS.values():
        assert isinstance(metric.higher_is_better, bool)
        assert metric.__doc__
    assert {name for name, metric in METRICS.items() if metric.higher_is_better} == {
        "accuracy",
        "same_tokens",
        "cosine",
        "snr_db",
        "sound_snr_db",
        "psnr_db",
        "judged_as_asked",
        "ssim",
    }


@pytest.mark.parametrize("metric", OUTPUT, ids=lambda metric: type(metric).__name__)
class TestEveryOutputMetric:
    def test_says_worse_of_a_larger_error(self, metric):
        rng = np.random.default_rng(0)
        original, noise = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
        small, large = (metric.measure(original, original + size * noise) for size in (0.01, 0.5))
        assert (small > large) == metric.higher_is_better
        assert small != large

    def test_does_not_see_the_order_of_the_elements(self, metric):
        if isinstance(metric, WorstColumn):  # which sees columns, by what it is: its own test holds rows and columns
            return
        rng = np.random.default_rng(0)
        original, candidate, order = rng.normal(size=20), rng.normal(size=20), rng.permutation(20)
        shuffled = metric.measure(original[order].reshape(4, 5), candidate[order].reshape(4, 5))
        assert shuffled == pytest.approx(metric.measure(original, candidate), rel=1e-12)

    def test_a_nan_is_never_lost(self, metric):
        original = np.ones(3, np.float32)
        assert np.isnan(metric.measure(original, np.array([1, np.nan, 1], np.float32)))
        assert np.isnan(metric.measure(np.zeros(3), np.array([0, np.nan, 0])))

    def test_counts_in_float64(self, metric):
        """The step from 2048 to 2049 is lost in float16, and 200 - 100 wraps in int8."""
        wide = metric.measure(np.array([2048.0, 60000.0]), np.array([2050.0, -60000.0]))
        assert metric.measure(np.array([2048, 60000], "e"), np.array([2050, -60000], "e")) == pytest.approx(
            wide, rel=1e-3
        )
        bytes_ = metric.measure(np.array([-100, 1], "b"), np.array([100, 1], "b"))
        assert bytes_ == metric.measure(np.array([-100.0, 1.0]), np.array([100.0, 1.0]))

    def test_an_output_without_elements_is_a_perfect_one(self, metric):
        empty = np.zeros((0, 4))
        assert metric.measure(empty, empty) == metric.measure(np.zeros(1), np.zeros(1))


def test_listing_the_folder_needs_no_numpy():
    code = (
        "import sys, enginewright.validation.metrics; assert 'numpy' not in sys.modules;"
        "enginewright.validation.metrics.load_metrics(); assert 'numpy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
