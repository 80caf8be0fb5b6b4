import json

import pytest
import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan, without
from enginewright.passes.specialize.fix_inputs import FixInputs, WithoutInputs
from tests.engines import built, exported, in_onnxruntime
from tests.passes.conftest import Subject, bert, diffusers_dit, reference_dit


def outcome(subject: Subject, **values):
    step = FixInputs(inputs=values)
    return step.apply(subject.copy(), Context(calibration=[subject.inputs], example=subject.inputs))


def kept(subject, values):
    return {name: tensor for name, tensor in subject.inputs.items() if name not in values}


def first(output):
    return output if isinstance(output, Tensor) else output[0]


CASES = {
    "timestep": (reference_dit, {"t": 500.0}),
    "class": (reference_dit, {"y": 2}),
    "both": (reference_dit, {"t": 500.0, "y": 2}),
    "diffusers": (lambda: diffusers_dit("AttnProcessor2_0"), {"timestep": 400, "class_labels": 1}),
    "bert": (lambda: bert("sdpa"), {"attention_mask": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fixed_input_is_that_input_given_with_every_call(case):
    make, values = CASES[case]
    subject = make()
    result = outcome(subject, **values)
    rows = {name: tensor[:1].repeat(3, *[1] * (tensor.ndim - 1)) for name, tensor in subject.inputs.items()}  # 3, not 2
    given = {**rows, **{name: torch.full_like(rows[name], value) for name, value in values.items()}}
    with torch.no_grad():
        wanted = first(subject.model(**given))
        found = first(result.model(**kept(Subject(model=subject.model, inputs=rows, paths=()), values)))
        reference = FixInputs(inputs=values).intended(subject.model, result.plan, Context())
        also = first(reference(**kept(Subject(model=subject.model, inputs=rows, paths=()), values)))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert torch.equal(also, wanted)


def test_what_the_constants_decide_is_gone():
    """DiT tiny, width 32: all of the condition is constant, but a vector of 192 for each block and 64 for the last."""
    result = outcome(reference_dit(), t=500.0, y=2)
    modulations = ["blocks.0.adaLN_modulation", "blocks.1.adaLN_modulation", "final_layer.adaLN_modulation"]
    assert result.changed == ("t_embedder", "y_embedder", *modulations)
    embedders = 256 * 32 + 32 + 32 * 32 + 32 + 5 * 32
    modulation = 2 * (32 * 192 + 192) + 32 * 64 + 64
    assert result.before.parameter_count - result.after.parameter_count == embedders + modulation
    assert result.before.macs - result.after.macs == 2 * (256 * 32 + 32 * 32 + 2 * 32 * 192 + 32 * 64)
    stored = 4 * (2 * 32 + 2 * 192 + 64)
    tables = 4 * 128  # the timestep's frequencies
    assert result.before.bytes - result.after.bytes == 4 * (embedders + modulation) + tables - stored


def test_what_another_input_decides_too_stays():
    assert outcome(reference_dit(), t=500.0).changed == ("t_embedder",)


def test_inputs_can_be_fixed_one_after_the_other(dit):
    context = Context(calibration=[dit.inputs])
    once = FixInputs(inputs={"t": 500.0}).apply(dit.copy(), context).model
    left = {"x": dit.inputs["x"], "y": dit.inputs["y"]}
    twice = FixInputs(inputs={"y": 2}).apply(once, Context(calibration=[left])).model
    with torch.no_grad():
        wanted = dit.model(dit.inputs["x"], torch.full((2,), 500.0), torch.full((2,), 2))
        torch.testing.assert_close(twice(x=dit.inputs["x"]), wanted, atol=1e-6, rtol=0)


class Styled(nn.Module):
    """A style vector that enters twice, in modules that no other input reaches."""

    def __init__(self):
        super().__init__()
        self.style, self.own, self.pair = nn.Linear(3, 4), nn.Linear(4, 4), Pair()

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        a, b = self.pair(style)
        return self.own(x) * self.style(style) + self.style(a + b)


class Pair(nn.Module):
    def forward(self, x):
        return x, 2 * x


def styled():
    inputs = {"x": torch.randn(2, 4), "style": torch.tensor([[1.0, 2.0, 3.0]] * 2)}
    return Subject(model=Styled(), inputs=inputs, paths=())


def test_a_vector_can_be_bound_and_what_is_no_constant_says_why():
    subject = styled()
    result = outcome(subject, style=[1.0, 2.0, 3.0])
    assert result.changed == ("",), "the input is gone, though no module is constant"
    assert result.plan.skipped == {
        "style": "its calls give different values",
        "pair": "it gives a tuple, not a tensor",
    }
    with torch.no_grad():
        torch.testing.assert_close(result.model(x=subject.inputs["x"]), subject.model(**subject.inputs))


def test_an_input_that_decides_no_module_is_gone_all_the_same():
    result = outcome(bert("sdpa"), attention_mask=1)
    assert result.changed == ("",)
    assert result.plan.choice[""] == WithoutInputs(without=("attention_mask",))


def test_a_plan_comes_back_from_text():
    plan = outcome(reference_dit(), t=500.0).plan
    again = Plan.from_json(plan.as_json(), plan.arrays, by=FixInputs().declared)
    assert json.loads(plan.as_json())["facts"]["bound"]["t"]["value"] == 500
    assert again.digest() == plan.digest()


def test_a_model_with_fixed_inputs_exports_runs_and_builds(tmp_path):
    subject = reference_dit()
    result = outcome(subject, t=500.0, y=2)
    inputs = {"x": subject.inputs["x"]}
    path = exported(result.model, inputs, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(in_onnxruntime(path, inputs), result.model(**inputs), atol=1e-5, rtol=0)
    assert list(built(path, inputs).iterdir())


# What a user can mend


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "fix_inputs needs inputs"),
        ({"tt": 1}, "there is no input named 'tt'"),
        ({"t": "noon"}, r"t is bound to 'noon', which is no row of its shape \(\)"),
        ({"x": [1.0, 2.0]}, r"x is bound to \[1.0, 2.0\], which is no row of its shape \(4, 8, 8\)"),
        ({"y": 1.5}, r"y is bound to 1.5; it takes whole numbers \(int64\)"),
        ({"x": 0, "t": 0, "y": 0}, "every input is bound"),
    ],
)
def test_what_cannot_be_bound_is_quoted(dit, values, message):
    with pytest.raises(ToolchainError, match=message):
        FixInputs(inputs=values).plan(dit.model, Context(calibration=[dit.inputs]))


def test_without_a_call_nothing_can_be_followed(dit):
    with pytest.raises(ToolchainError, match="follows one call of the model and got none"):
        FixInputs(inputs={"t": 1}).plan(dit.model, Context())


def test_whatever_makes_calls_leaves_the_fixed_inputs_out(dit):
    calls = [dit.inputs]
    makers = {"draw": lambda count, seed: calls, "calls_in": lambda text: calls}
    context = Context(calibration=calls, example=dit.inputs, **makers)
    left = without(context, ("t",))
    for call in (left.calibration[0], left.example, left.draw(1, 0)[0], left.calls_in("file")[0]):
        assert set(call) == {"x", "y"}
    assert without(Context(), ("t",)).draw is None
