"""16-bit computation, and what stays in 32 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.quantization.convert_dtype import ConvertDtype
from tests.engines import exported, in_onnxruntime


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
    assert abs(result.plan.facts.error - error) < 1e-3


class Filtered(nn.Module):
    """A convolution with a constant kernel takes what a layer gives; another constant is added, which may be fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fir = nn.Conv2d(3, 3, 1), Fir()
        self.register_buffer("offset", torch.full((3, 1, 1), 1 / 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fir(self.layer(x)) + self.offset


class Fir(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.rand(3, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, self.kernel, groups=3)


def test_a_constant_that_an_operator_takes_beside_converted_values_is_converted_and_no_other(calm):
    inputs = {"x": torch.randn(2, 3, 5, 5)}
    model = Filtered().eval()
    wanted = model(**inputs)
    result = ConvertDtype().apply(model, context_for(inputs))

    assert list(result.plan.facts.constants) == ["fir"]
    assert (result.model.fir.kernel.dtype, result.model.offset.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(result.model(**inputs), wanted, atol=5e-3, rtol=5e-3)


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
    one, two = (
        step.rewrite(dit.copy(), plan),
        step.rewrite(dit.copy(), Plan.from_json(plan.as_json(), by=step.declared)),
    )
    assert torch.equal(dit.output(one), dit.output(two))


def test_it_exports_with_the_same_interface_and_onnx_runtime_agrees(dit, tmp_path):
    import onnxruntime

    from enginewright.targets.onnx_export import export_onnx

    result = ConvertDtype().apply(dit.copy(), context_for(dit.inputs))
    path = tmp_path / "m.onnx"
    export_onnx(result.model, dit.inputs, dynamic={}, outputs=["out"], path=path)
    session = onnxruntime.InferenceSession(path)
    assert {i.name: i.type for i in session.get_inputs()}["x"] == "tensor(float)"
    [got] = session.run(None, {name: tensor.numpy() for name, tensor in dit.inputs.items()})
    torch.testing.assert_close(torch.from_numpy(got), dit.output(result.model), atol=2e-2, rtol=2e-2)


# Values that no module shows


class Hidden(nn.Module):
    """300 squared is 90,000, above what 16 bits hold; divided by, it is a 0 and shows nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.other = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.loud.weight = nn.Parameter(torch.eye(32) * 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.loud(x)
        return self.other(h / (h * h + 1).sqrt())


class NormByHand(nn.Module):
    """A layer norm of operators, as users write it, over values of some hundreds."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.other = nn.Linear(32, 32), nn.Linear(32, 32)
        with torch.no_grad():
            self.loud.weight *= 2_000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.loud(x)
        centred = h - h.mean(-1, keepdim=True)
        return self.other(centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())


@pytest.mark.parametrize("kind", [Hidden, NormByHand])
def test_an_overflow_that_is_divided_by_is_found_and_its_layer_kept(kind, calm):
    inputs = {"x": torch.randn(4, 32)}
    model = kind().eval()
    with torch.no_grad():
        wanted = model(**inputs)
        halved = copy.deepcopy(model).half()(inputs["x"].half()).float()
    assert float((halved - wanted).norm() / wanted.norm()) > 0.3, "true half precision is wrong without help"
    result = ConvertDtype().apply(model, context_for(inputs))
    assert result.changed == ("other",)
    assert "come from within loud were not finite" in result.plan.skipped["loud"]
    assert result.plan.facts.error < 0.01
    with torch.no_grad():
        got = result.model(**inputs)
    assert float((got - wanted).norm() / wanted.norm()) < 0.01


def test_a_mask_that_hides_with_infinities_is_no_overflow(calm):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.q(x) @ self.k(x).transpose(-1, -2)
            hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
            return scores.masked_fill(hidden, float("-inf")).softmax(-1)

    inputs = {"x": torch.randn(2, 6, 8)}
    assert set(ConvertDtype().apply(Masked().eval(), context_for(inputs)).changed) == {"q", "k"}


def test_an_error_above_what_is_allowed_gives_layers_back_and_at_last_all(calm):
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    context = context_for({"x": torch.randn(4, 32)})
    free = ConvertDtype(dtype="bfloat16").plan(Chain().eval(), context)
    assert len(free.choice) == 2
    bound = free.facts.error * 0.95
    tight = ConvertDtype(dtype="bfloat16", max_error=bound).plan(Chain().eval(), context)
    assert len(tight.choice) == 1
    assert tight.facts.error <= bound
    assert any("the model's error was" in reason for reason in tight.skipped.values())
    none = ConvertDtype(dtype="bfloat16", max_error=1e-9).plan(Chain().eval(), context)
    assert none.choice == {}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_norms_run_with_statistics_of_their_type(dtype, affine, calm, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    for _ in range(3):
        model(torch.randn(8, 3, 9, 9) * 2 + 1)
    model.eval()
    inputs = {"input": torch.randn(2, 3, 9, 9)}
    with torch.no_grad():
        wanted = model(**inputs)
        result = ConvertDtype(dtype=dtype).apply(copy.deepcopy(model), context_for(inputs))
        got = result.model(**inputs)
    assert set(result.changed) == {"0", "1", "3"}
    assert result.model[1].running_mean.dtype == getattr(torch, dtype)
    assert 0 < float((got - wanted).norm() / wanted.norm()) < (0.005 if dtype == "float16" else 0.05)
    assert model[1].running_mean.dtype == torch.float32
    if dtype == "float16":
        path = exported(result.model, inputs, tmp_path)
        torch.testing.assert_close(in_onnxruntime(path, inputs), got, atol=5e-3, rtol=5e-3)
