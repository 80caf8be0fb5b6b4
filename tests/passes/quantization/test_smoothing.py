from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from enginewright.models.vision.drsformer import ChannelNorm
from enginewright.passes.contract import Context
from enginewright.passes.quantization.grouping import DividedNorm, Smoothing
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8
from enginewright.passes.quantization.smoothing import divided, factors, scales_with_weight
from tests.passes.conftest import Subject


class Normed(nn.Module):
    """A norm that two layers read, and nothing else unless ``residual``; then a layer behind an activation."""

    def __init__(self, norm: nn.Module, *, residual: bool = False) -> None:
        super().__init__()
        self.norm, self.residual = norm, residual
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y = self.c(torch.relu(self.a(h)) * self.b(h))
        return y + h if self.residual else y


def outlying(seed: int = 0) -> torch.Tensor:
    """Inputs (B, N, K) with two channels far above the rest."""
    x = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 60
    x[..., 40] *= 25
    return x


def exact(module: nn.Module) -> nn.Module:
    """Take the rounding out of quantized layers: the smoothing alone stays."""
    for name, child in list(module.named_children()):
        if type(child).__name__ == "QuantizedLinear":
            module.add_module(name, Exact(child))
        else:
            exact(child)
    return module


class Exact(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.layer.inverse is None else x * self.layer.inverse
        return x @ self.layer.unrounded.T + self.layer.bias


def keep_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each quantized layer remember the weight that it rounded."""
    from enginewright.passes.quantization import quantize_int8

    class Remembering(quantize_int8.QuantizedLinear):
        def __init__(self, linear: nn.Linear, *rest: object) -> None:
            super().__init__(linear, *rest)  # type: ignore[arg-type]
            self.unrounded = linear.weight.detach()

    Remembering.__name__ = "QuantizedLinear"
    monkeypatch.setattr(quantize_int8, "QuantizedLinear", Remembering)


def test_factors_are_equation_4() -> None:
    found = factors(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([4.0, 4.0, 2.0]), 0.5)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("norm", "residual", "folds"),
    [
        (lambda: nn.LayerNorm(64), False, True),
        (lambda: nn.RMSNorm(64), False, True),
        (lambda: nn.LayerNorm(64), True, False),
        (lambda: nn.LayerNorm(64, elementwise_affine=False), False, False),
    ],
    ids=["layer norm", "rms norm", "read by a residual too", "norm without a weight"],
)
def test_smoothing_alone_changes_nothing_and_folds_only_where_that_is_exact(
    norm: object, residual: bool, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_unrounded(monkeypatch)
    net = Normed(norm(), residual=residual).eval()  # type: ignore[operator]
    x = outlying()
    before = net(x).detach()
    result = QuantizeInt8(smooth=0.5).apply(net, Context(calibration=[{"x": x}]))
    assert ("norm" in result.changed) == folds
    assert result.plan.choice["a"].smooth == Smoothing(by="a.smooth", folded=folds)
    assert result.plan.choice["b"].smooth == result.plan.choice["a"].smooth, "a and b read the same"
    assert result.plan.choice["c"].smooth == Smoothing(by="c.smooth", folded=False)
    assert (result.model.a.inverse is None) == folds
    torch.testing.assert_close(exact(result.model)(x).detach(), before, rtol=1e-5, atol=1e-5)


def test_an_outlying_channel_costs_less_with_smoothing() -> None:
    net = Normed(nn.LayerNorm(64)).eval()
    with torch.no_grad():
        net.norm.weight[3] = 60
    x, held_out = outlying(), outlying(1)
    wanted = net(held_out).detach()
    errors = {}
    for smooth in (0, 0.5):
        done = QuantizeInt8(smooth=smooth).apply(copy.deepcopy(net), Context(calibration=[{"x": x}])).model
        errors[smooth] = float((done(held_out).detach() - wanted).norm() / wanted.norm())
    assert errors[0.5] < 0.7 * errors[0]


def test_a_norm_read_by_an_excluded_layer_too_is_left_alone() -> None:
    net = Normed(nn.LayerNorm(64))
    plan = QuantizeInt8(smooth=0.5, exclude=("b",)).plan(net, Context(calibration=[{"x": outlying()}]))
    assert "norm" not in plan.choice
    assert plan.choice["a"].smooth.folded is False


def test_a_norm_that_the_model_returns_is_left_alone() -> None:
    class Returning(Normed):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            h = self.norm(x)
            return self.a(h), h

    plan = QuantizeInt8(smooth=0.5).plan(Returning(nn.LayerNorm(64)), Context(calibration=[{"x": outlying()}]))
    assert "norm" not in plan.choice


def test_a_norm_that_adds_one_to_its_weight_is_not_taken_for_one_that_can_be_divided() -> None:
    class OnePlusRMSNorm(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, (64,), 1 + self.weight)

    assert scales_with_weight(nn.RMSNorm(64))
    assert scales_with_weight(nn.LayerNorm(64))
    assert not scales_with_weight(OnePlusRMSNorm(64))
    assert not scales_with_weight(nn.GroupNorm(4, 64))


def test_a_norm_that_takes_maps_alone_is_left_as_it_is() -> None:
    norm = ChannelNorm(64)
    assert norm(torch.randn(2, 64, 3, 3)).shape == (2, 64, 3, 3)
    assert not scales_with_weight(norm)


def test_dividing_a_norm_leaves_the_original_alone() -> None:
    norm = nn.LayerNorm(8)
    twin = divided(norm, torch.full((8,), 2.0))
    x = torch.randn(3, 8)
    torch.testing.assert_close(2 * twin(x), norm(x))
    assert norm.weight.tolist() == [1.0] * 8


def test_real_families_keep_their_output(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_unrounded(monkeypatch)
    model = subject.copy()
    before = subject.output(model)
    result = QuantizeInt8(smooth=0.7, smallest=512).apply(model, Context(calibration=[subject.inputs]))
    folded = [path for path, decision in result.plan.choice.items() if isinstance(decision, DividedNorm)]
    assert folded == [
        path for path, _ in model.named_modules() if path.endswith(("layernorm_before", "layernorm_after"))
    ]
    torch.testing.assert_close(subject.output(exact(result.model)), before, rtol=1e-5, atol=1e-5)
