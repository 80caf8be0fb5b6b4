"""Number formats: what passes write, what targets make of it, and what a recipe says before work starts."""

from __future__ import annotations

import pytest

from enginewright import catalog
from enginewright.ground.errors import ToolchainError
from enginewright.recipe import make
from enginewright.show import describe
from enginewright.targets.onnxruntime_engine import OnnxRuntime

STEPS = [
    {"pass": "quantize_int8"},
    {"pass": "quantize_fp8"},
    *({"pass": "quantize_weights", "weights": weights} for weights in ("int4", "int8", "nvfp4", "mxfp8")),
    {"pass": "quantize_weights", "activations": "int8"},
    *({"pass": "quantize_svd", "residual": residual} for residual in ("int4", "int8")),
    {"pass": "quantize_svd", "activations": "none"},
    {"pass": "prune_heads"},
]


@pytest.mark.parametrize("name", catalog.entries("targets"))
def test_every_target_answers_for_every_format(name: str) -> None:
    formats = catalog.target_class(name).formats
    for table in STEPS:
        step = catalog.pass_class(table["pass"])(**{key: value for key, value in table.items() if key != "pass"})
        assert set(step.formats) <= formats.keys()
    assert all(answer in ("native", "emulated") or answer.startswith("refused: ") for answer in formats.values())
    assert describe(name)["formats"] == formats


def recipe(step: dict[str, object], **target: object) -> dict[str, object]:
    return {"model": "dit:tiny", "steps": [step], "targets": [{"target": "onnxruntime", **target}]}


def test_an_emulated_format_is_a_note_and_a_native_one_is_not() -> None:
    [note] = make(recipe({"pass": "quantize_fp8"})).notes
    assert note.startswith("quantize_fp8 writes fp8, which onnxruntime emulates")
    assert not make(recipe({"pass": "quantize_int8"})).notes
    assert not make(recipe({"pass": "prune_heads"})).notes


def test_a_refused_format_is_an_error_unless_the_target_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "formats", {**OnnxRuntime.formats, "fp8": "refused: it has no such type"})
    with pytest.raises(ToolchainError, match="onnxruntime refuses: it has no such type") as caught:
        make(recipe({"pass": "quantize_fp8"}))
    assert caught.value.where == "steps[0]"
    [note] = make(recipe({"pass": "quantize_fp8"}, optional=True)).notes
    assert "refuses (it has no such type)" in note
