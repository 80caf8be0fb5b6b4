"""Deciding and rewriting linear layers group by group: those that read the same tensor are smoothed by one vector.

Shapes: R rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from enginewright.passes.contract import Context, Decision, Plan
from enginewright.passes.kernel.scales import calibration_facts, unusable
from enginewright.passes.kernel.statistics import InputStatistics
from enginewright.passes.quantization.reading import readings
from enginewright.passes.quantization.smoothing import divided, multiplied

NEVER = "never called on the calibration inputs"


class Smoothing(BaseModel):
    """What a layer's input is divided by, and its weight multiplied."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: str = Field(description="name of the array (K,)")
    folded: bool = Field(description="whether the norm before the layer is divided, or else the input in each call")


class QuantizedLayer(Decision):
    """How a linear layer is quantized."""

    arrays: ClassVar[Mapping[str, str]] = {
        ".smooth": "what input channels are divided by (K,), for this layer and those after it that read the same"
    }

    smooth: Smoothing | None = Field(None, description="how its input is smoothed")

    def array_names(self, path: str) -> set[str]:
        """Its own arrays, and the one that smooths it, which may bear another layer's name."""
        own = {f"{path}{suffix}" for suffix in self.arrays if suffix != ".smooth"}
        return own | {self.smooth.by} if self.smooth else own


class DividedNorm(Decision):
    """A norm whose output is divided for the layers behind it."""

    divided_by: str = Field(description="name of the array (K,) of those layers")

    def array_names(self, path: str) -> set[str]:
        """The array of the layers behind it."""
        return {self.divided_by}


L = TypeVar("L", bound=QuantizedLayer)


@dataclass(frozen=True)
class Chosen(Generic[L]):
    """What was chosen for layers that read the same.

    Args:
        decisions: by path.
        s: what their input channels (K,) are divided by; None: nothing.
        arrays: decided tensors, by a name that begins with a path.
    """

    decisions: Mapping[str, L]
    s: Tensor | None = None
    arrays: Mapping[str, Tensor] = field(default_factory=dict)


Choose = Callable[[Mapping[str, nn.Linear], Mapping[str, InputStatistics]], Chosen[L]]
"""From layers that read the same and what was seen of the input of each, by path."""

Build = Callable[[str, nn.Linear, L, Tensor | None], nn.Module]
"""From a path, its layer (with s in its weight), its decision and what its input is multiplied by (1/s, or None)."""


def plan_groups(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    skipped: Mapping[str, str],
    context: Context,
    choose: Choose[L],
    *,
    histogram: bool = False,
    products: bool = False,
) -> Plan[L | DividedNorm]:
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
    choice: dict[str, L | DividedNorm] = {}
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
            smooth = Smoothing(by=name, folded=norm is not None)
            choice |= {path: chosen.decisions[path].model_copy(update={"smooth": smooth}) for path in paths}
            if norm is not None:
                choice[norm] = DividedNorm(divided_by=name)
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    facts = calibration_facts(context)
    return Plan(
        choice={path: choice[path] for path in sorted(choice, key=order.__getitem__)},
        skipped=reasons,
        facts=facts,
        arrays=arrays,
    )


def rewrite_layers(model: nn.Module, plan: Plan[L | DividedNorm], build: Build[L]) -> nn.Module:
    """Put what ``build`` makes in the place of each planned layer, and divide the norms that smooth."""
    for path, decision in plan.choice.items():
        layer = model.get_submodule(path)
        if isinstance(decision, DividedNorm):
            fresh = divided(layer, plan.array(decision.divided_by))
        else:
            assert isinstance(layer, nn.Linear), f"{path} is no linear layer any more"
            smooth = decision.smooth
            s = None if smooth is None else plan.array(smooth.by)
            inverse = None if s is None or smooth is None or smooth.folded else 1 / s
            fresh = build(path, multiplied(layer, s), decision, inverse)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, fresh)
    return model
