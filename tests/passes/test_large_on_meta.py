"""What every pass does with a network that is larger than memory: FLUX.1-dev's 11.9 B parameters on the meta device."""

from __future__ import annotations

import re
import resource

import pytest
import torch

from enginewright import catalog
from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context

REASONS = "|".join(
    (
        "^planned$",
        "meta device",
        "calibration",
        "there is no score|no score '",
        "needs (inputs|condition|adapters|file|constant|layers and rank)",
        "0 different teachers",
        "which stack is to be cut",
        "one call of the model and got none|stay the same over a run",
    )
)
"""A pass that cannot plan says what it lacks: weights, calibration, a score, or parameters that have no default."""


@pytest.fixture(scope="module")
def flux() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_901_408_320
    return model.eval()


@pytest.mark.parametrize(
    "name", [name for name in catalog.entries("passes") if catalog.pass_class(name).works_on == "module"]
)
def test_it_plans_on_shapes_or_says_what_it_lacks(name: str, flux: torch.nn.Module) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert re.search(REASONS, answer(name, flux))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000, "kilobytes: weights were made real"


def answer(name: str, model: torch.nn.Module) -> str:
    """``planned``, or what stands in the way."""
    try:
        step = catalog.pass_class(name)()
        if step.needs_calibration:
            step.apply(model, Context())
        plan = step.plan(model, Context())
    except ToolchainError as error:
        return error.message
    return "planned" if plan.choice or plan.skipped else "planned nothing, and gave no reason"


PLANNED = {
    "prune_width": ({"importance": "random"}, 76),
    "perturb_heads": ({}, None),
}


@pytest.mark.parametrize("name", PLANNED)
def test_these_need_no_values_at_all(name: str, flux: torch.nn.Module) -> None:
    parameters, changed = PLANNED[name]
    plan = catalog.pass_class(name)(**parameters).plan(flux, Context())
    assert len(plan.choice) == (changed or len(plan.choice)) > 0
