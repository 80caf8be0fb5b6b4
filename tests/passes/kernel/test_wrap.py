import copy
import inspect
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.wrap import Around, AroundByName, all_around, around, wrap


class Doubling(nn.Module):
    """Twice the input, plus a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, y=0.0, **named):
        return 2 * x + y + self.bias + sum(named.values())


@dataclass(frozen=True)
class Plus(Around):
    """Adds a number to the answer, or the one that a call gives."""

    number: float
    name: str = ""

    @property
    def adds(self):
        return (self.name,) if self.name else ()

    def run(self, forward, *args, **inputs):
        given = inputs.pop(self.name, None)
        return forward(*args, **inputs) + (self.number if given is None else given)


@dataclass(frozen=True)
class Times(Plus):
    """Multiplies the answer."""

    def run(self, forward, *args, **inputs):
        return forward(*args, **inputs) * self.number


@dataclass(frozen=True)
class WithoutY(AroundByName):
    """Gives y itself; all else by name."""

    removes = ("y",)

    def answer(self, forward, inputs):
        return forward(y=5.0, **inputs)


@pytest.fixture
def net():
    return Doubling()


def test_the_last_one_is_outermost(net):
    wrap(net, Plus(3))
    wrap(net, Times(10))
    assert net(torch.tensor(1.0)) == (2 + 1 + 3) * 10
    assert [type(each) for each in all_around(net)] == [Plus, Times]


def test_class_and_paths_stay(net):
    model = nn.Sequential(net)
    wrap(net, Plus(3))
    assert type(net) is Doubling
    assert [path for path, _ in model.named_modules()] == ["", "0"]
    assert model(torch.tensor(1.0)) == 6


def test_the_signature_says_how_the_module_is_called_now(net):
    wrap(net, Plus(3, name="more"))
    kinds = {name: each.kind.name for name, each in inspect.signature(net.forward).parameters.items()}
    assert kinds == {
        "x": "POSITIONAL_OR_KEYWORD",
        "y": "POSITIONAL_OR_KEYWORD",
        "more": "KEYWORD_ONLY",
        "named": "VAR_KEYWORD",
    }
    wrap(net, WithoutY())
    assert str(inspect.signature(net.forward).replace(return_annotation=None)).startswith("(*, x, more:")
    assert net(x=torch.tensor(1.0), more=7.0) == 2 + 5 + 1 + 7
    with pytest.raises(TypeError, match="1 inputs are given by position"):
        net(torch.tensor(1.0))


@pytest.mark.parametrize("copied", [copy.deepcopy, share, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_answers_with_its_own_weights(net, copied):
    wrap(net, Plus(3))
    twin = copied(net)
    twin.bias = nn.Parameter(torch.tensor(100.0))
    assert (net(torch.tensor(0.0)), twin(torch.tensor(0.0))) == (4, 103)


def test_a_forward_that_was_set_on_the_module_alone_is_called_still(net):
    net.forward = lambda x: x - 1
    wrap(net, Plus(3))
    wrap(net, Plus(10))
    assert net(torch.tensor(1.0)) == 13


def test_the_outermost_of_a_kind_is_found(net):
    assert around(net, Plus) is None
    wrap(net, Plus(3))
    wrap(net, Plus(4))
    wrap(net, WithoutY())
    assert around(net, Plus) == Plus(4)


def test_it_is_exported_with_what_is_around_it(net):
    wrap(net, Plus(3, name="more"))
    rows = torch.export.Dim("rows", min=1, max=8)
    x, more = torch.arange(4.0), torch.ones(4)
    shapes = {"x": {0: rows}, "more": {0: rows}}
    program = torch.export.export(net, (), {"x": x, "more": more}, dynamic_shapes=shapes)
    found = program.module()(x=x[:3], more=more[:3])
    torch.testing.assert_close(found, 2 * x[:3] + 1 + 1)
