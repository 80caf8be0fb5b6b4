"""The one calibration loop: what it looks at and leaves behind, and that it computes as loops written by hand do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from enginewright.passes.contract import Context
from enginewright.passes.kernel.hidden_units import activation_scores
from enginewright.passes.kernel.observe import Look, floats_in, looking, observe, reading, rounds, tensors_in
from enginewright.passes.kernel.statistics import Products, Squares
from enginewright.passes.pruning.factorize import products_of
from enginewright.passes.pruning.prune_depth import influences
from enginewright.passes.quantization.convert_dtype import ConvertDtype
from enginewright.passes.traits import BlockStack, FeedForward, layers_of
from tests.passes.conftest import Subject


class Dropping(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x)))


def calls(subject: Subject, count: int = 3) -> list[dict[str, Tensor]]:
    """Several calls like the subject's own, each with other values."""
    found = []
    for _ in range(count):
        call = dict(subject.inputs)
        for name, value in call.items():
            if value.is_floating_point():
                call[name] = torch.randn(value.shape)
        found.append(call)
    return found


def recorded(model: nn.Module, layer: nn.Module, calibration: list[dict[str, Tensor]]) -> Tensor:
    """Everything that a layer reads, kept whole, as rows in double precision."""
    rows: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].double().flatten(0, -2)))
    with torch.no_grad():
        for call in calibration:
            model(**call)
    hook.remove()
    return torch.cat(rows)


# What it does and what it leaves


def test_a_model_in_training_is_observed_without_dropout_and_goes_on_training() -> None:
    model = Dropping().train()
    model.first.eval()
    squares, x = Squares(), torch.randn(16, 8)
    observe(model, [reading(model.last, squares)], Context(calibration=[{"x": x}]), doing="reading")
    torch.testing.assert_close(squares.total, model.first(x).double().square().sum(0).detach())
    assert [m.training for m in (model, model.first, model.drop, model.last)] == [True, False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_precision_is_chosen_without_dropout() -> None:
    model, x = Dropping().train(), torch.randn(16, 8)
    plans = [ConvertDtype().plan(model, Context(calibration=[{"x": x}])).facts.error for _ in range(2)]
    assert plans[0] == plans[1] < 0.01


def test_no_look_stays_after_an_error() -> None:
    model = Dropping()

    def fail(inputs: object, named: object) -> None:
        raise RuntimeError("stop")

    looks = [Look(model.first, after=lambda inputs, named, output: None), Look(model.last, before=fail)]
    with pytest.raises(RuntimeError, match="stop"):
        observe(model, looks, Context(calibration=[{"x": torch.ones(1, 8)}]), doing="reading")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_look_gives_takes_the_place_of_what_was_there() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    doubled = Look(layer, before=lambda inputs, named: (2 * inputs[0],))
    negative = Look(layer, after=lambda inputs, named, output: -output)
    with looking([doubled]):
        assert torch.equal(layer(x), torch.nn.functional.linear(2 * x, layer.weight, layer.bias))
    with looking([negative]):
        assert torch.equal(layer(x), -torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_a_layer_that_is_called_by_name_is_read_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model, squares, x = Named(), Squares(), torch.randn(3, 4)
    observe(model, [reading(model.layer, squares)], Context(calibration=[{"x": x}]), doing="reading")
    torch.testing.assert_close(squares.total, x.double().square().sum(0))


def test_each_call_is_made_once_and_its_progress_said() -> None:
    told: list[tuple[int, int, str]] = []
    met: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            met.append(int(x))
            return x

    context = Context(calibration=[{"x": torch.tensor(n)} for n in range(3)], say=lambda *said: told.append(said))
    given: list[Tensor] = []
    observe(Counting(), (), context, doing="counting", each=given.append)
    assert met == [0, 1, 2] == [int(x) for x in given]
    assert told == [(n, 3, "counting") for n in range(4)]


# The same as loops that were written by hand


def test_products_are_those_of_all_rows_kept_together(subject: Subject) -> None:
    model, calibration = subject.model, calls(subject)
    layers = {path: layer for path, layer in model.named_modules() if type(layer) is nn.Linear}
    found = {path: total for path, _, total in products_of(model, layers, Context(calibration=calibration))}
    reached = [path for path, total in found.items() if total is not None]
    assert len(reached) > 8
    for path in reached:
        rows = recorded(model, layers[path], calibration)
        torch.testing.assert_close(found[path], rows.T @ rows, rtol=1e-12, atol=1e-12)


def test_products_do_not_depend_on_how_many_layers_are_read_at_once(
    dit: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {path: layer for path, layer in dit.model.named_modules() if type(layer) is nn.Linear}
    context = Context(calibration=calls(dit))
    whole = list(products_of(dit.model, layers, context))
    monkeypatch.setattr("enginewright.passes.kernel.observe.AT_ONCE", 1)
    single = list(products_of(dit.model, layers, context))
    assert [path for path, *_ in whole] == [path for path, *_ in single] == list(layers)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(whole, single, strict=True) if a[2] is not None)


def test_scores_by_activation_are_those_of_all_rows_kept_together(dit: Subject) -> None:
    calibration, layers = calls(dit), dict(layers_of(dit.model, FeedForward))
    found = activation_scores(dit.model, layers, Context(calibration=calibration))
    for path, layer in layers.items():
        rows = recorded(dit.model, layer.output, calibration)
        wanted = rows.norm(dim=0) * layer.output.weight.detach().double().abs().sum(dim=0)
        torch.testing.assert_close(found[path], wanted, rtol=1e-12, atol=1e-12)


def test_the_influence_of_blocks_is_that_of_streams_kept_whole(dit: Subject) -> None:
    calibration, stacks = calls(dit), dict(layers_of(dit.model, BlockStack))
    found = influences(dit.model, stacks, Context(calibration=calibration))
    [(path, stack)] = stacks.items()
    for number, block in enumerate(stack.blocks):
        cosines: list[Tensor] = []
        hook = block.register_forward_hook(
            lambda _, given, got, cosines=cosines: cosines.append(
                torch.cosine_similarity(given[0].double(), got.double(), dim=-1)
            )
        )
        with torch.no_grad():
            for call in calibration:
                dit.model(**call)
        hook.remove()
        assert found[f"{path}.{number}"] == pytest.approx(1 - float(torch.cat(cosines).mean()), rel=1e-5)


# Rounds and nested values


def test_rounds_hold_what_fits_and_a_large_one_alone() -> None:
    assert rounds({"a": 3, "b": 3, "c": 5, "d": 20, "e": 1}, at_once=8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert rounds({}, at_once=8) == []


def test_tensors_are_found_in_order_however_nested() -> None:
    one, two, three = torch.ones(1), torch.ones(2, dtype=torch.long), torch.ones(3)
    assert [len(t) for t in tensors_in({"a": (one, [two]), "b": None, "c": three})] == [1, 2, 3]
    assert [len(t) for t in floats_in(({"a": one}, two, [three]))] == [1, 3]


def test_a_statistic_keeps_nothing_of_a_call() -> None:
    import weakref

    layer, products = nn.Linear(4, 4), Products()
    x = torch.randn(5, 4)
    gone = weakref.ref(x)
    with torch.no_grad(), looking([reading(layer, products)]):
        layer(x)
    del x
    assert gone() is None
    assert products.total is not None
