import pytest
import torch

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.specialize.merge_guidance import MergeGuidance
from enginewright.targets.onnx_export import export_onnx
from tests.engines import built, exported, in_onnxruntime
from tests.passes.conftest import SUBJECTS

CONDITIONS = {"reference_dit": "y", "diffusers_dit_sdpa": "class_labels"}


def two_calls(subject, condition, w, channels=8):
    with_it = subject.output(subject.model)
    plain = {**subject.inputs, condition: torch.full((2,), 4)}
    with torch.no_grad():
        without = subject.model(**plain)
    without = without if isinstance(without, torch.Tensor) else without[0]
    moved = without + w * (with_it - without)
    return torch.cat([moved[:, :channels], with_it[:, channels:]], dim=1)


def merged(subject, condition, **parameters):
    step = MergeGuidance(condition=condition, none=4, **parameters)
    return step, step.apply(subject.copy(), Context(calibration=[subject.inputs], example=subject.inputs))


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("channels", [None, 3])
def test_one_call_gives_what_two_give(name, channels):
    subject = SUBJECTS[name]()
    step, result = merged(subject, CONDITIONS[name], scale=3.0, channels=channels)
    wanted = two_calls(subject, CONDITIONS[name], 3.0, channels or 8)
    torch.testing.assert_close(subject.output(result.model), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(subject.output(step.intended(subject.model, result.plan, Context())), wanted)
    assert (wanted - subject.output(subject.model)).abs().max() > 1e-2


def test_each_row_has_a_scale_of_its_own(dit):
    step, result = merged(dit, "y")
    (new,) = step.new_inputs(result.plan)
    assert (new.name, new.default) == ("guidance_scale", 4.0)
    w = torch.tensor([1.0, 6.0])
    with torch.no_grad():
        found = result.model(**dit.inputs, guidance_scale=w)
    wanted = two_calls(dit, "y", w.view(2, 1, 1, 1))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0], dit.output(dit.model)[0], atol=1e-5, rtol=0)


def test_a_scale_can_be_baked_in(dit):
    step, result = merged(dit, "y", scale=2.0, fixed=True)
    assert step.new_inputs(result.plan) == ()
    torch.testing.assert_close(dit.output(result.model), two_calls(dit, "y", 2.0), atol=1e-5, rtol=1e-5)


def test_both_rows_are_counted(dit):
    _, result = merged(dit, "y")
    assert result.after.macs == 2 * result.before.macs
    assert result.after.bytes == result.before.bytes


def test_a_guided_model_exports_runs_and_builds(dit, tmp_path):
    _, result = merged(dit, "y")
    inputs = {**dit.inputs, "t": dit.inputs["t"].float(), "guidance_scale": torch.tensor([1.5, 3.0])}
    path = exported(result.model, inputs, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(in_onnxruntime(path, inputs), result.model(**inputs), atol=1e-4, rtol=1e-4)
    assert list(built(path, inputs).iterdir())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs none: what y is when there is no condition"),
        ({"condition": "z", "none": 1}, "no input named 'z'"),
        ({"none": [1, 2]}, r"none is \[1, 2\], which is no row of y, \(\)"),
        ({"none": "all"}, r"none is 'all', which is no row of y, \(\)"),
    ],
)
def test_what_cannot_be_merged_is_quoted(dit, parameters, message):
    with pytest.raises(ToolchainError, match=message):
        MergeGuidance(**parameters).plan(dit.model, Context(calibration=[dit.inputs]))


def test_without_a_call_there_is_nothing_to_look_at(dit):
    with pytest.raises(ToolchainError, match="got none"):
        MergeGuidance(none=4).plan(dit.model, Context())


@pytest.mark.parametrize("fixed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_guided_model_exports_with_an_open_batch(dit, tmp_path, fixed):
    _, result = merged(dit, "", fixed=fixed, scale=3.0)
    scale = {} if fixed else {"guidance_scale": torch.tensor([1.5, 3.0])}
    inputs = {**dit.inputs, "t": dit.inputs["t"].float(), **scale}
    dynamic = {name: {0: ("batch", 1, 64)} for name in inputs}
    export_onnx(result.model, inputs, dynamic=dynamic, outputs=["y_"], path=tmp_path / "model.onnx")
    for rows in (1, 3):
        call = {name: value[:1].repeat(rows, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
        with torch.no_grad():
            wanted = result.model(**call)
        torch.testing.assert_close(in_onnxruntime(tmp_path / "model.onnx", call), wanted, atol=1e-4, rtol=1e-4)
