import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.gates import GateBound, gate_names, judge, parse
from enginewright.validation.metrics import load_metrics

KNOWN = gate_names(load_metrics())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fidelity.cosine >= 0.999", ("fidelity.cosine", None, ">=", 0.999)),
        ("latency.ratio<=0.8", ("latency.ratio", None, "<=", 0.8)),
        ("  quality.judged_as_asked  >  .96 ", ("quality.judged_as_asked", None, ">", 0.96)),
        ("onnxruntime: latency.ratio_high < 1", ("latency.ratio_high", "onnxruntime", "<", 1.0)),
        ("fidelity.max_abs <= 1e-5", ("fidelity.max_abs", None, "<=", 1e-5)),
        ("fidelity.snr_db >= -3.", ("fidelity.snr_db", None, ">=", -3.0)),
    ],
)
def test_a_gate_is_read_and_says_itself_again(text, expected):
    gate = parse(text, known=KNOWN)
    assert (gate.name, gate.target, gate.operator, gate.bound) == expected
    assert parse(str(gate), known=KNOWN) == gate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fidelity.cosine",
        "fidelity.cosine == 1",
        "fidelity.cosine >= ",
        "fidelity.cosine >= nan",
        "fidelity.cosine >= 0.9 0.8",
        "0.9 <= fidelity.cosine",
        "fidelity.cosine => 0.9",
        ": fidelity.cosine >= 0.9",
        "latency.ratio <= 80 %",
    ],
)
def test_what_is_no_gate_is_quoted_beside_an_example(text):
    with pytest.raises(ToolchainError) as caught:
        parse(text, known=KNOWN, where="recipe.toml, gates[0]")
    assert repr(text) in caught.value.message
    assert "fidelity.cosine >= 0.999" in str(caught.value.help)
    assert caught.value.where == "recipe.toml, gates[0]"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("fidelity.cosin", "fidelity.cosine"), ("latency.ratios", "latency.ratio"), ("cosine", "fidelity.cosine")],
)
def test_an_unknown_figure_meets_its_nearest(name, nearest):
    with pytest.raises(ToolchainError, match=f"'{name}'") as caught:
        parse(f"{name} >= 1", known=KNOWN)
    assert str(caught.value.help).startswith(f"did you mean {nearest!r}")


@pytest.mark.parametrize(
    ("operator", "value", "verdict"),
    [
        (">=", 0.5, "met"),
        (">=", 0.49, "missed"),
        ("<=", 0.5, "met"),
        ("<=", 0.51, "missed"),
        (">", 0.51, "met"),
        (">", 0.5, "missed"),
        ("<", 0.49, "met"),
        ("<", 0.5, "missed"),
        (">=", float("inf"), "met"),
        ("<=", float("inf"), "missed"),
    ],
)
def test_bounds_hold_or_not(operator, value, verdict):
    gate = GateBound(name="latency.ratio", target=None, operator=operator, bound=0.5)
    assert judge(gate, value)[0] == verdict


@pytest.mark.parametrize("operator", [">=", "<=", ">", "<"])
def test_nan_is_missed_whatever_the_bound(operator):
    gate = GateBound(name="fidelity.cosine", target=None, operator=operator, bound=0.5)
    assert judge(gate, float("nan")) == ("missed", "fidelity.cosine is not a number")


def test_what_was_not_measured_is_neither_met_nor_missed():
    gate = parse("latency.ratio <= 0.8", known=KNOWN)
    assert judge(gate, None, "no GPU here") == ("not_measured", "no GPU here")
    assert judge(gate, None) == ("not_measured", "latency.ratio was not measured")
    assert judge(gate, 0.0)[0] == "met"


def test_a_miss_says_both_numbers_however_near():
    gate = parse("fidelity.cosine >= 0.9999999", known=KNOWN)
    assert judge(gate, 0.99999985) == ("missed", "fidelity.cosine is 0.99999985, asked for >= 0.9999999")


@pytest.mark.parametrize(
    ("text", "interval", "verdict"),
    [
        ("latency.ratio <= 1", (0.9, 0.99), "met"),
        ("latency.ratio <= 1", (0.9, 1.01), "inconclusive"),
        ("latency.ratio <= 1", (1.01, 1.2), "missed"),
        ("latency.ratio >= 1", (1.01, 1.2), "met"),
        ("latency.ratio >= 1", (0.9, 1.01), "inconclusive"),
        ("latency.ratio >= 1", (0.9, 0.99), "missed"),
        ("latency.ratio < 1", (0.9, 1.0), "inconclusive"),
        ("latency.ratio <= 1", (0.9, float("nan")), "missed"),
    ],
)
def test_the_whole_interval_meets_a_bound_or_misses_it_or_nothing_can_be_said(text, interval, verdict):
    found, reason = judge(parse(text, known=KNOWN), sum(interval) / 2, interval=interval)
    assert found == verdict
    assert bool(reason) == (verdict != "met")
    if verdict == "inconclusive":
        assert f"{interval[0]:g} to {interval[1]:g}, holds the bound 1.0" in reason


@pytest.mark.parametrize("bound", [0.1, 10.0])
def test_an_unsafe_figure_meets_and_misses_nothing(bound):
    gate = GateBound(name="latency.ratio", target=None, operator="<=", bound=bound)
    assert judge(gate, 1.0, interval=(0.99, 1.01), unsafe="it was interrupted") == (
        "inconclusive",
        "it was interrupted",
    )


@pytest.mark.parametrize("text", ["latency.ratio <= 1e999", "fidelity.cosine >= -1e400"])
def test_a_bound_without_end_is_refused(text):
    with pytest.raises(ToolchainError, match="would bound nothing") as caught:
        parse(text, known=KNOWN, where="recipe.toml, gates[0]")
    assert caught.value.where == "recipe.toml, gates[0]"
