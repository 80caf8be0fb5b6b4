"""Every reference model keeps the contract of a model file."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from enginewright import catalog, sources
from enginewright.ground.signature import Dim
from enginewright.show import describe
from enginewright.sources.reference import WEIGHTS, outputs_of, sizes_of
from enginewright.validation.inputs import draw


@pytest.mark.parametrize("name", catalog.entries("models"))
def test_the_tiny_size_takes_its_inputs_at_any_batch_and_names_its_outputs(name: str) -> None:
    model = sources.load(f"{name}:tiny")
    assert not model.module.training
    outputs = []
    for batch in (1, 3):
        arrays = draw(model.inputs, seed=batch, sizes={"batch": batch})
        with torch.no_grad():
            found = model.module(**{k: torch.from_numpy(v) for k, v in arrays.items()})
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        assert len(found) == len(model.outputs)
        assert all(len(tensor) == batch for tensor in found)
        assert all(tensor.isfinite().all() and tensor.double().std() > 0 for tensor in found)
        outputs.append(found)
    for one, other in zip(*([tensor[:1].double() for tensor in found] for found in outputs), strict=True):
        assert (one - other).norm() > 1e-2 * one.norm(), "it does not look at its inputs"


@pytest.mark.parametrize("name", catalog.entries("models"))
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    one, two, other = (sources.load(f"{name}:tiny", seed=s).module.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", catalog.entries("models"))
def test_every_size_describes_itself(name: str) -> None:
    module = catalog.load("models", name)
    for size, config in sizes_of(module).items():
        assert outputs_of(module, config), size
        specs = module.inputs(config)
        assert any(isinstance(d, Dim) and d.name == "batch" for spec in specs for d in spec.shape), size
    for size in module.SHIPPED:
        assert (WEIGHTS / f"{name}-{size}.safetensors").is_file()


LONG = ("splitflux:dev",)
"""Sizes that take long to count, though they are the last that were published."""


def every_size() -> list[Any]:
    """All sizes of all models; but for the last published one and those that are small with the mark ``slow``."""
    found = []
    for name in catalog.entries("models"):
        module = catalog.load("models", name)
        tried = {*list(module.PUBLISHED)[-1:], *module.SHIPPED, "tiny"}
        for size in sizes_of(module):
            text = f"{name}:{size}"
            marks = () if size in tried and text not in LONG else (pytest.mark.slow,)
            found.append(pytest.param(text, id=text, marks=marks))
    return found


@pytest.mark.parametrize("text", every_size())
def test_every_size_is_shown_with_no_weight_in_memory(text: str) -> None:
    found = describe(text)
    assert json.loads(json.dumps(found)) == found
    assert found["parameter_count"] > 0
    assert found["macs"] > 0
    assert [each["name"] for each in found["inputs"]]
    assert found["outputs"]


def test_shipped_weights_stay_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 60e6
