"""16-bit computation, and what stays in 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.contract import Context, Plan
from passes.quantization.convert_dtype import ConvertDtype
from toolchain.errors import ToolchainError


def context_for(inputs):
    return Context(calibration=[inputs], example=inputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_family_computes_in_16_bits_and_answers_in_32(subject, dtype):
    wanted = subject.output(subject.model)
    result = ConvertDtype(dtype=dtype).apply(subject.copy(), context_for(subject.inputs))
    got = subject.output(result.model)

    assert got.dtype == torch.float32
    error = float((got - wanted).norm() / wanted.norm())
    assert 0 < error < (0.005 if dtype == "float16" else 0.05)
    assert result.after.bytes < 0.55 * result.before.bytes
    assert result.after.parameter_count == result.before.parameter_count
    assert abs(result.plan.facts["error"] - error) < 1e-3


class Loud(nn.Module):
    """The first layer's values are far above what 16 bits hold; a norm brings them back."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.norm, self.quiet = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        with torch.no_grad():
            self.loud.weight *= 1e6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quiet(self.norm(self.loud(x)))


def test_layers_that_would_overflow_stay_in_fp32(calm):
    inputs = {"x": torch.randn(5, 8)}
    model = Loud().eval()
    wanted = model(**inputs)
    result = ConvertDtype().apply(model, context_for(inputs))

    assert result.changed == ("quiet",)
    assert set(result.plan.skipped) == {"loud", "norm"}
    assert all("would overflow" in reason for reason in result.plan.skipped.values())
    assert result.model.quiet.weight.dtype == torch.float16
    torch.testing.assert_close(result.model(**inputs), wanted, atol=5e-3, rtol=5e-3)


def test_bfloat16_has_the_range_and_converts_them(calm):
    inputs = {"x": torch.randn(5, 8)}
    result = ConvertDtype(dtype="bfloat16", tolerance=1.0).apply(Loud().eval(), context_for(inputs))
    assert set(result.changed) == {"loud", "norm", "quiet"}


def test_a_layer_that_loses_too_much_stays_and_its_output_goes_on_in_16_bits(calm):
    class Cancel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.difference, self.after = nn.Linear(2, 1, bias=False), nn.Linear(1, 3)
            self.difference.weight = nn.Parameter(torch.tensor([[1000.0, -1000.0]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.difference(x))

    inputs = {"x": torch.tensor([[1.0001, 1.0], [1.0, 1.0003]])}
    result = ConvertDtype().apply(Cancel().eval(), context_for(inputs))
    assert result.changed == ("after",)
    assert "its relative error would be" in result.plan.skipped["difference"]
    seen = []
    result.model.after.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    result.model(**inputs)
    assert seen == [torch.float16]


def test_values_between_layers_that_overflow_are_found_by_trying(calm):
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.inner.weight = nn.Parameter(torch.eye(4) * 300)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.inner(x) ** 2).log1p())

    inputs = {"x": torch.full((2, 4), 2.0)}
    model = Square().eval()
    wanted = model(**inputs)
    result = ConvertDtype().apply(model, context_for(inputs))
    assert result.model(**inputs).isfinite().all()
    assert result.changed == ("head",)
    assert "within inner were not finite" in result.plan.skipped["inner"]
    torch.testing.assert_close(result.model(**inputs), wanted, atol=1e-2, rtol=1e-2)


def test_a_model_that_overflows_whatever_is_kept_is_refused(calm):
    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.a(x) * float("inf")) * 0

    inputs = {"x": torch.ones(2, 4)}
    with pytest.raises(ToolchainError, match="in float16 the model's output is not finite"):
        ConvertDtype().plan(Out().eval(), context_for(inputs))


def test_excluded_layers_stay(dit):
    result = ConvertDtype(exclude=("blocks.*",)).apply(dit.copy(), context_for(dit.inputs))
    assert not any(path.startswith("blocks.") for path in result.changed)
    assert result.model.blocks[0].mlp.fc1.weight.dtype == torch.float32
    with pytest.raises(ToolchainError, match=r"exclude 'x\.y' matches no layer"):
        ConvertDtype(exclude=("x.y",)).plan(dit.copy(), context_for(dit.inputs))


def test_a_plan_is_carried_out_again_from_its_text(dit):
    step = ConvertDtype()
    plan = step.plan(dit.model, context_for(dit.inputs))
    one, two = step.rewrite(dit.copy(), plan), step.rewrite(dit.copy(), Plan.from_json(plan.as_json()))
    assert torch.equal(dit.output(one), dit.output(two))


def test_it_exports_with_the_same_interface_and_onnx_runtime_agrees(dit, tmp_path):
    import onnxruntime

    from targets.onnx_export import export_onnx

    result = ConvertDtype().apply(dit.copy(), context_for(dit.inputs))
    path = tmp_path / "m.onnx"
    export_onnx(result.model, dit.inputs, dynamic={}, outputs=["out"], path=path)
    session = onnxruntime.InferenceSession(path)
    assert {i.name: i.type for i in session.get_inputs()}["x"] == "tensor(float)"
    [got] = session.run(None, {name: tensor.numpy() for name, tensor in dit.inputs.items()})
    torch.testing.assert_close(torch.from_numpy(got), dit.output(result.model), atol=2e-2, rtol=2e-2)
