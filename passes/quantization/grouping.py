"""Deciding and rewriting linear layers group by group: those that read the same tensor are smoothed by one vector.

Shapes: R rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from enginewright.passes.contract import Context, Plan
from enginewright.passes.kernel.scales import calibration_facts, unusable
from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.quantization.reading import readings
from enginewright.passes.quantization.smoothing import divided, multiplied

NEVER = "never called on the calibration inputs"


@dataclass(frozen=True)
class Chosen:
    """What was chosen for layers that read the same.

    Args:
        decisions: by path.
        s: what their input channels (K,) are divided by; None: nothing.
        arrays: decided tensors, by a name that begins with a path.
    """

    decisions: Mapping[str, dict[str, Any]]
    s: Tensor | None = None
    arrays: Mapping[str, Tensor] = field(default_factory=dict)


Choose = Callable[[Mapping[str, nn.Linear], Mapping[str, InputStatistics]], Chosen]
"""From layers that read the same and what was seen of the input of each, by path."""

Build = Callable[[str, nn.Linear, Mapping[str, Any], Tensor | None], nn.Module]
"""From a path, its layer (with s in its weight), its decision and what its input is multiplied by (1/s, or None)."""


def plan_groups(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    skipped: Mapping[str, str],
    context: Context,
    choose: Choose,
    *,
    histogram: bool = False,
    products: bool = False,
) -> Plan:
    """A plan for the layers that the calibration inputs reach; ``skipped`` goes into it.

    Args:
        model: that has the layers.
        layers: by path.
        skipped: others, with the reason.
        context: has the calibration calls.
        choose: decides for layers that read the same.
        histogram: whether it asks for percentiles.
        products: whether it asks for X^T X.
    """
    reasons = {**skipped, **dict.fromkeys(layers, NEVER)}
    choice: dict[str, Any] = {}
    arrays: dict[str, Tensor] = {}
    for group, seen in readings(model, layers, context, histogram=histogram, products=products):
        for path, statistics in seen.items():
            reasons.pop(path)
            if reason := unusable(statistics):
                reasons[path] = reason
        paths = [path for path in group.layers if path not in reasons]
        if not paths:
            continue
        context.say(len(choice), len(layers), f"choosing: {paths[0]}")
        chosen = choose({path: layers[path] for path in paths}, {path: seen[path] for path in paths})
        choice |= chosen.decisions
        arrays |= chosen.arrays
        if chosen.s is not None:
            norm = group.norm if len(paths) == len(group.layers) else None
            name = f"{paths[0]}.smooth"
            arrays[name] = chosen.s
            for path in paths:
                choice[path] = {**choice[path], "smooth": {"by": name, "folded": norm is not None}}
            if norm is not None:
                choice[norm] = {"divided_by": name}
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    facts = calibration_facts(context)
    return Plan(
        choice={path: choice[path] for path in sorted(choice, key=order.__getitem__)},
        skipped=reasons,
        facts=facts,
        arrays=arrays,
    )


def rewrite_layers(model: nn.Module, plan: Plan, build: Build) -> nn.Module:
    """Put what ``build`` makes in the place of each planned layer, and divide the norms that smooth."""
    for path, decision in plan.choice.items():
        layer = model.get_submodule(path)
        if "divided_by" in decision:
            fresh = divided(layer, plan.arrays[decision["divided_by"]])
        else:
            assert isinstance(layer, nn.Linear), f"{path} is no linear layer any more"
            smooth = decision.get("smooth")
            s = None if smooth is None else plan.arrays[smooth["by"]]
            inverse = None if s is None or smooth["folded"] else 1 / s
            fresh = build(path, multiplied(layer, s), decision, inverse)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, fresh)
    return model
