import numpy as np
import pytest

from toolchain.errors import ToolchainError
from validation.fidelity import compare, non_finite, worst
from validation.metrics import load_metrics

ONE = {"logits": np.array([[3.0, 4.0]], np.float32), "pooled": np.array([1.0], np.float32)}
TWO = {"logits": np.array([[1.0, 0.0]], np.float32), "pooled": np.array([2.0], np.float32)}


def moved(arrays, name, by):
    return {**arrays, name: arrays[name] + np.asarray(by, arrays[name].dtype)}


def test_the_worst_input_counts_whichever_way_a_metric_points():
    candidates = [moved(ONE, "logits", [0.0, 1.0]), moved(TWO, "logits", [0.0, 1.0])]
    logits, pooled = compare([ONE, TWO], candidates)

    assert (logits.output, pooled.output) == ("logits", "pooled")
    assert logits.worst["max_abs"] == 1.0
    assert logits.worst["mean_abs"] == 0.5
    assert logits.worst["relative_l2"] == 1.0  # 1 / 5 on the first input, 1 / 1 on the second
    assert logits.worst["cosine"] == pytest.approx(0.5**0.5)
    assert logits.worst["snr_db"] == pytest.approx(0.0)
    assert pooled.worst == {"max_abs": 0, "mean_abs": 0, "relative_l2": 0, "cosine": 1, "snr_db": np.inf}


def test_a_nan_on_one_input_is_the_worst_of_all():
    (logits, _) = compare([ONE, TWO], [moved(ONE, "logits", [np.nan, 0.0]), TWO])
    assert all(np.isnan(value) for value in logits.worst.values())


def test_worst_respects_the_direction():
    metrics = load_metrics()
    assert worst(metrics["cosine"], [0.9, 1.0]) == 0.9
    assert worst(metrics["max_abs"], [0.9, 1.0]) == 1.0
    assert np.isnan(worst(metrics["max_abs"], [0.9, np.nan, 1.0]))


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({"pooled": ONE["pooled"]}, "output 'logits' is missing; the engine gives pooled"),
        ({**ONE, "extra": ONE["pooled"]}, "output 'extra' is not one of the original's: logits, pooled"),
        ({**ONE, "logits": ONE["logits"].T}, r"output 'logits' has shape \(2, 1\); the original's is \(1, 2\)"),
        ({**ONE, "logits": ONE["logits"].astype("e")}, "output 'logits' is float16; the original's is float32"),
    ],
)
def test_outputs_that_do_not_agree_are_named(candidate, message):
    with pytest.raises(ToolchainError, match=message):
        compare([TWO, ONE], [TWO, candidate])


def test_no_inputs_is_not_a_perfect_engine():
    with pytest.raises(ToolchainError, match="0 validation inputs"):
        compare([], [])


def test_non_finite_values_are_counted_over_the_inputs():
    second = {**TWO, "logits": np.array([[np.nan, -np.inf]])}
    third = {**TWO, "logits": np.array([[np.nan, 1.0]])}
    assert non_finite([ONE, second, third]) == ["output 'logits' holds 2 NaN and 1 infinite among 6 values"]


def test_finite_outputs_need_no_words_whatever_their_type():
    assert non_finite([ONE, {"classes": np.array([1, 2]), "mask": np.array([True])}]) == []
