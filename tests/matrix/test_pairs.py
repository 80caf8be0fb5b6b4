"""Two passes in a row on three small networks: refused with a reason, or right together.

Every ordered pair runs with ``make test-all``; the default suite has a sample in which each pass comes first once, and
second once. Few of those are on Flux, whose export takes a minute.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from enginewright import catalog, pipeline, sources
from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Plan
from enginewright.passes.kernel.surgery import share
from enginewright.passes.networks import networks_of, program_of
from enginewright.programs import called_as, graph_of
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.targets.pytorch_engine import flat
from enginewright.validation.inputs import draw
from tests.matrix.cells import settings_of, step_for
from tests.matrix.models import STRINGS
from tests.matrix.test_passes_on_models import EXPORTED_SETTING, SCORE, call, distance, raw, tolerance, two_sizes

NETWORKS = ("dit_tiny", "flux", "convolutions")
PASSES = tuple(name for name in catalog.entries("passes") if catalog.pass_class(name).works_on == "module")
APART = 7
"""How far apart in the alphabet the two passes of a sampled pair are; it divides no count of passes evenly."""


def pairs() -> list[Any]:
    """Every pair on every network; all but the sample with the mark ``matrix``."""
    found = []
    for i, first in enumerate(PASSES):
        for j, second in enumerate(PASSES):
            for network in NETWORKS:
                sampled = (j - i) % len(PASSES) == APART and network == network_of(i)
                marks = () if sampled else (pytest.mark.matrix,)
                found.append(pytest.param(first, second, network, id=f"{first}-{second}-{network}", marks=marks))
    return found


def network_of(pair: int) -> str:
    """The network that a sampled pair is tried on."""
    return "flux" if pair % 10 == 0 else ("dit_tiny", "convolutions")[pair % 2]


@pytest.mark.parametrize(("first", "second", "network"), pairs())
def test_two_passes_are_refused_or_right_together(first: str, second: str, network: str, tmp_path: Path) -> None:
    text = STRINGS[network]
    (tmp_path / "score.py").write_text(SCORE)
    model = sources.load(text)
    try:
        steps = [
            {"pass": name, **step_for(name, settings(name), model, text, tmp_path).model_dump(exclude_none=True)}
            for name in (first, second)
        ]
        content = {"model": text, "steps": steps, "calibration": {"calls": 2}, "validation": {"threads": 1, "calls": 1}}
        run = pipeline.Run(make(content, folder=tmp_path), Progress(quiet=True))
        module = run.optimize()
    except ToolchainError:
        return  # in words, which is an answer
    for _, result, _ in run.results:
        assert result.plan.choice or result.plan.skipped or result.plan.facts.notes, "a silent nothing"
    replayed = again(run)
    arrays = run.exported.batches(1, 5)[0]
    for got, wanted in zip(call(replayed, arrays), call(module, arrays), strict=True):
        assert distance(got, wanted) <= 1e-6, "the recorded plans give another module"
    hints_are_found(run, module)
    exported_is_eager(run, module, tmp_path / "out", max(tolerance(name, network) for name in (first, second)))
    moved = run.recipe.moved(tmp_path / "elsewhere")
    assert moved.path(moved.steps[0].model_dump().get("file") or ".").exists() or first != "fold_adapters"


def settings(name: str) -> dict[str, Any]:
    """The setting of a pass that changes most."""
    return dict(settings_of(name)[EXPORTED_SETTING.get(name, -1)])


def again(run: pipeline.Run) -> nn.Module:
    """The module that the plans give when they are read back."""
    module = share(run.model.module)
    for step, result, _ in run.results:
        plan = Plan.from_json(result.plan.as_json(), result.plan.arrays, by=step.declared)
        module = step.carry_out(module, plan, Context())
    return module.eval()


def hints_are_found(run: pipeline.Run, module: nn.Module) -> None:
    """Every 8-bit layer has its hint, under the path that it has in its own network."""
    for network in networks_of(module).values():
        quantized = {path for path, layer in network.named_modules() if type(layer).__name__ == "QuantizedLinear"}
        hints = run.hints.of(network, module)
        assert quantized <= hints.keys(), "a quantized layer lost what was said of it"
        assert hints.keys() <= {path for path, _ in network.named_modules()}


def exported_is_eager(run: pipeline.Run, module: nn.Module, out: Path, allowed: float) -> None:
    """Each network's graph computes at two sizes what the network does; or the export refuses it in words."""
    out.mkdir()
    program = program_of(module)
    for name, network in networks_of(module).items():
        called, path = called_as(program, name, run.exported), graph_of(out, name)
        try:
            pipeline.write_graph(run, called, network, path)
        except ToolchainError:
            return
        for number, sizes in enumerate(two_sizes(called)):
            arrays = draw(called.inputs, seed=11 + number, sizes=sizes)
            with torch.no_grad():
                wanted = flat(network(**{key: torch.from_numpy(array) for key, array in arrays.items()}))
            for got, want in zip(raw(path, arrays), wanted, strict=True):
                assert distance(got, want.numpy()) <= allowed, f"{name} at {sizes}"
    shutil.rmtree(out)
