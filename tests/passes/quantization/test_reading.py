"""What is seen of the inputs of linear layers, and which layers read one tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from enginewright.passes.contract import Context
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8
from enginewright.passes.quantization.quantize_weights import QuantizeWeights
from enginewright.passes.quantization.reading import readings


class TwoReaders(nn.Module):
    """Two layers that read the model's own input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.never = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) + self.b(x))


def layers_in(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def test_layers_that_read_the_models_input_are_together_each_time_it_is_read() -> None:
    model, context = TwoReaders(), Context(calibration=[{"x": torch.randn(4, 32)}])
    for _ in range(2):
        groups = [group.layers for group, _ in readings(model, layers_in(model), context)]
        assert groups == [("a", "b"), ("c",)]
    one, other = (QuantizeInt8(smooth=0.5).plan(model, context) for _ in range(2))
    assert one.digest() == other.digest()
    assert one.choice["a"].smooth.by == one.choice["b"].smooth.by


def test_every_row_of_every_call_counts() -> None:
    """The rows that matter come once, far behind the others: all see them, however few rows are kept."""
    model = nn.Sequential(nn.Linear(32, 8))
    x = torch.zeros(6000, 32)
    x[:, 0] = 1
    x[4321, 5] = 9
    calls = [{"input": part} for part in x.split(1500)]
    [(_, seen)] = readings(model, {"0": model[0]}, Context(calibration=calls), products=True, histogram=True)
    torch.testing.assert_close(seen["0"].products, x.double().T @ x.double())
    assert seen["0"].sizes.largest[5] == 9
    assert seen["0"].sizes.mean[5] == pytest.approx(9 / 6000)
    assert len(seen["0"].rows()) == 1025
    assert seen["0"].rows()[-1, 5] == 9


def test_reading_few_layers_at_once_gives_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context = TwoReaders(), Context(calibration=[{"x": torch.randn(4, 32)} for _ in range(3)])
    for step in (QuantizeWeights(algorithm="gptq"), QuantizeWeights(algorithm="awq"), QuantizeInt8(smooth=0.5)):
        whole = step.plan(model, context)
        with monkeypatch.context() as patched:
            patched.setattr("enginewright.passes.kernel.observe.AT_ONCE", 1)
            parts = step.plan(model, context)
        assert whole.digest() == parts.digest()
        assert whole.choice.keys() == {"a", "b", "c"}
        assert whole.skipped["never"] == "never called on the calibration inputs"


def test_scales_are_chosen_without_dropout() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(32, 32)).train()
    x = torch.ones(64, 32)
    plan = QuantizeInt8().plan(model, Context(calibration=[{"input": x}]))
    assert plan.choice["1"].input_scale == pytest.approx(1 / 127, rel=1e-5)
    assert model.training
