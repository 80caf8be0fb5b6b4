import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.fidelity import compare, dead_columns, empty, non_finite, worst
from enginewright.validation.metrics import load_metrics

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
    none = {"max_abs": 0, "mean_abs": 0, "relative_l2": 0, "cosine": 1, "snr_db": np.inf, "worst_column": 0}
    assert pooled.worst == none


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


def test_one_call_of_eight_that_is_far_off_is_named_beside_the_middle_one():
    originals = [{"y": np.ones((2, 3), np.float32)} for _ in range(8)]
    errors = [0.01] * 8
    errors[2] = 0.2
    candidates = [{"y": each["y"] * np.float32(1 + error)} for each, error in zip(originals, errors, strict=True)]
    (found,) = compare(originals, candidates)
    assert (found.calls, found.worst_call) == (8, 3)
    assert found.worst["relative_l2"] == pytest.approx(0.2, rel=1e-5)
    assert found.median["relative_l2"] == pytest.approx(0.01, rel=1e-4)


def test_the_middle_of_infinite_figures_is_a_number():
    (found,) = compare([{"y": np.ones(2)}] * 2, [{"y": np.ones(2)}, {"y": np.zeros(2)}])
    assert found.median["snr_db"] == 0


def padded(rows):
    """An output (2, 4, 3) whose last two tokens of the second row are padding, and that mask."""
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int64)
    return np.random.default_rng(0).normal(size=(2, 4, rows)), mask


def test_padded_rows_do_not_count_and_are_given_beside():
    original, mask = padded(3)
    candidate = original + 1e-6
    candidate[1, 2:] = 99.0
    (found,) = compare([{"y": original}], [{"y": candidate}], [mask])
    assert found.masked
    assert found.worst["max_abs"] == pytest.approx(1e-6)
    assert found.worst["relative_l2"] < 1e-5
    assert found.everywhere["relative_l2"] > 10
    (whole,) = compare([{"y": original}], [{"y": candidate}])
    assert (whole.masked, whole.everywhere) == (False, {})
    assert whole.worst == found.everywhere


def test_an_error_in_a_real_row_still_counts():
    original, mask = padded(3)
    candidate = original.copy()
    candidate[1, 1] = 99.0
    (found,) = compare([{"y": original}], [{"y": candidate}], [mask])
    assert found.worst["relative_l2"] > 10


def test_a_mask_leaves_outputs_alone_that_have_no_row_a_token():
    original, mask = padded(3)
    pooled, logits = original[:, 0], np.random.default_rng(1).normal(size=(2, 4))  # as wide as there are tokens
    wanted = {"pooled": pooled, "logits": logits, "start_logits": logits}
    pooled, plain, scores = compare([wanted], [{name: each + 1 for name, each in wanted.items()}], [mask])
    assert (pooled.masked, plain.masked, scores.masked) == (False, False, True)


def test_a_mask_that_keeps_every_row_changes_nothing():
    original, mask = padded(3)
    (found,) = compare([{"y": original}], [{"y": original}], [np.ones_like(mask)])
    assert (found.masked, found.everywhere) == (False, {})


def test_outputs_without_an_element_are_no_perfect_ones():
    nothing, some = np.zeros((0, 4), np.float32), np.ones((2, 4), np.float32)
    wanted = [{"none": nothing, "some": nothing, "all": some}, {"none": nothing, "some": some, "all": some}]
    found = {each.output: each for each in compare(wanted, wanted)}
    assert found.keys() == {"some", "all"}
    assert (found["some"].calls, found["some"].worst_call) == (1, 2)
    assert empty(wanted) == ["none"]
    assert compare([{"none": nothing}], [{"none": nothing}]) == []


class TestDeadColumns:
    def test_a_column_that_varies_and_then_no_more_is_named(self):
        original = np.random.default_rng(0).normal(size=(3, 8, 7)) * [300, 300, 300, 300, 1, 1, 1]
        wanted = [{"scores": each} for each in original]
        dead = [{"scores": each * [1, 1, 1, 1, 0, 1, 0]} for each in original]
        (said,) = dead_columns(wanted, dead)
        assert "output 'scores' has dead columns: 4, 6 (2 of 7, counted from 0)" in said
        assert dead_columns(wanted, wanted) == []

    def test_a_channel_of_pictures(self):
        original = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
        (said,) = dead_columns([{"y": original}], [{"y": original * np.array([1, 0, 1])[:, None, None]}])
        assert "dead columns: 1 (1 of 3" in said

    @pytest.mark.parametrize(
        "column",
        [np.zeros(24), np.full(24, 5.0), 5 + 1e-6 * np.arange(24), np.eye(24)[3]],
        ids=["zero", "constant", "rounding", "one row"],
    )
    def test_what_hardly_moves_in_the_original_may_stand_still(self, column):
        original = np.random.default_rng(0).normal(size=(24, 2))
        original[:, 1] = column
        candidate = original.copy()
        candidate[:, 1] = column[0]
        assert dead_columns([{"y": original}], [{"y": candidate}]) == []

    def test_a_few_rows_say_nothing(self):
        original = np.random.default_rng(0).normal(size=(7, 2))
        assert dead_columns([{"y": original}], [{"y": original * 0}]) == []

    def test_padding_is_not_looked_at(self):
        rng = np.random.default_rng(0)
        original = rng.normal(size=(2, 8, 3))
        original[:, :4, 1] = 5
        candidate = original.copy()
        candidate[..., 1] = 5
        mask = np.array([[1] * 4 + [0] * 4] * 2)
        assert dead_columns([{"y": original}], [{"y": candidate}], [mask]) == []
        assert dead_columns([{"y": original}], [{"y": candidate}])
