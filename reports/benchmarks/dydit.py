"""How well ``dydit:digits`` draws beside ``dit:digits``, with its masks and compiled, and what it computes for that.

    python -m enginewright.reports.benchmarks.dydit [--samples N] [--buckets K] [--output FILE]

Guided runs of 25 steps in PyTorch from the same noise, read by the judge; no times. Compiled is what
``slice_width_by_timestep`` and ``skip_spatial_tokens`` make of the network: K networks by timestep. Room for tokens is
found on other runs than those that are judged. Writes ``reports/results/dydit.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from enginewright import sources
from enginewright.environment import describe, versions
from enginewright.ground.signature import Signature
from enginewright.models.blocks.digits import AT_ONCE, SAMPLER_STEPS, guided, met_on_runs, read, start
from enginewright.models.diffusion import dydit
from enginewright.passes.contract import Context
from enginewright.passes.dynamic.slice_width_by_timestep import SliceWidthByTimestep
from enginewright.passes.kernel.distance import relative_l2
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.skip_spatial_tokens import SkipSpatialTokens

RESULTS = Path(__file__).resolve().parent.parent / "results" / "dydit.json"
SEED, CALIBRATION_SEED = 0, 1
CALLS, ROWS = 60, 8
"""Calibration: calls, and rows of each."""
CONFIG = dydit.SHIPPED["digits"]


def judged(model: nn.Module, samples: int) -> float:
    """The share of drawn digits that the judge reads as the class that was asked for."""
    noise, y = start(samples, SEED)

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(x=x, t=t.float(), y=y)
        return out

    parts = zip(noise.split(AT_ONCE), y.split(AT_ONCE), strict=True)
    drawn = torch.cat([guided(denoise, part, label, none=CONFIG.classes) for part, label in parts])
    digit, _ = read(drawn.numpy())
    return round(float((torch.from_numpy(digit) == y).double().mean()), 4)


class Counted(nn.Module):
    """The masked network, which notes the share of multiply-accumulates of each call."""

    def __init__(self, net: dydit.DyDiT) -> None:
        super().__init__()
        self.net = net
        self.shares: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """What the network gives."""
        out, each = self.net.counted(x, t, y)
        self.shares.append(each)
        return out


def compiled(net: dydit.DyDiT, buckets: int) -> tuple[nn.Module, dict[str, Any]]:
    """Networks by timestep, each MLP on a fixed number of tokens; and what that amounts to."""
    calls = [
        {name: torch.from_numpy(value) for name, value in call.items()}
        for call in met_on_runs(net, none=CONFIG.classes, count=CALLS, seed=CALIBRATION_SEED, batch=ROWS)
    ]
    context = Context(calibration=calls, example=calls[0], signature=Signature(dydit.inputs(CONFIG)))
    width = SliceWidthByTimestep(steps=SAMPLER_STEPS, buckets=buckets).apply(share(net), context)
    tokens = SkipSpatialTokens().apply(width.model, context)
    facts = {
        "buckets": buckets,
        "table": list(width.plan.facts.table),
        "width_share_needed": width.plan.facts.share_needed,
        "width_share_computed": width.plan.facts.share_computed,
        "tokens": {path: [entry.tokens, entry.of] for path, entry in tokens.plan.choice.items()},
        "macs_of_width": share_of(width.after.macs, width.before.macs),
        "macs": share_of(tokens.after.macs, width.before.macs),
    }
    return tokens.model.eval(), facts


def share_of(after: int | None, before: int | None) -> float:
    """Of the multiply-accumulates of the network that computes everything."""
    assert after is not None
    assert before is not None
    return round(after / before, 4)


def difference(net: dydit.DyDiT, model: nn.Module) -> dict[str, float]:
    """How far the compiled networks are from the masks, in calls of other runs: for each call the relative error."""
    errors = []
    for call in met_on_runs(net, none=CONFIG.classes, count=50, seed=CALIBRATION_SEED + 1):
        inputs = {name: torch.from_numpy(value) for name, value in call.items()}
        with torch.no_grad():
            errors.append(relative_l2(net(**inputs), model(**inputs)))
    exact = sum(error < 1e-4 for error in errors) / len(errors)
    return {"largest_relative_l2": max(errors), "calls_equal_to_rounding": exact}


def measured(samples: int, buckets: int) -> dict[str, Any]:
    """All of it."""
    net = sources.load("dydit:digits").module
    assert isinstance(net, dydit.DyDiT)
    original = judged(sources.load("dit:digits").module, samples)
    masked = Counted(net)
    dynamic = judged(masked, samples)
    model, facts = compiled(net, buckets)
    return {
        "samples": samples,
        "original_judged_as_asked": original,
        "masked_judged_as_asked": dynamic,
        "points_lost": round(100 * (original - dynamic), 2),
        "masked_share_of_macs": round(float(torch.cat(masked.shares).mean()), 4),
        "compiled": {"judged_as_asked": judged(model, samples), **facts, **difference(net, model)},
    }


def main() -> None:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="digits drawn by each")
    parser.add_argument("--buckets", type=int, default=5, help="networks by timestep")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write")
    chosen = parser.parse_args()
    found = {"environment": describe(), "versions": versions(), **measured(chosen.samples, chosen.buckets)}
    chosen.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
