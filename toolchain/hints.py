"""What plans found out about layers, kept true while later steps move, replace or change those layers.

Targets get it under the module paths of each exported network, which need not be those that a pass saw.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from enginewright.passes.contract import Plan, as_json, module_at
from enginewright.passes.kernel.patterns import PATTERN, keeps_pattern
from enginewright.targets.contract import LayerHint


@dataclass
class Hints:
    """What the plans of a run say about layers, step by step.

    Args:
        found: what was said, by the path that a layer had then.
        layers: those layers.
        sparse: layers of the 2:4 pattern as they were made; those that lost it are out.
        notes: what a step, by number, did to earlier ones' layers, in sentences.
    """

    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, weakref.ref[nn.Module]] = field(default_factory=dict)
    sparse: dict[str, nn.Module] = field(default_factory=dict)
    notes: dict[int, list[str]] = field(default_factory=dict)

    def after(self, number: int, module: nn.Module, plan: Plan) -> None:
        """Take in what a step's plan says, and note which layers it took the 2:4 pattern from.

        Args:
            number: of the step.
            module: the model after it.
            plan: what it did.
        """
        lost = [path for path, layer in self.sparse.items() if not still_sparse(module, path, layer)]
        for path in lost:
            del self.sparse[path]
        if lost:
            listed = ", ".join(lost[:4]) + (", …" if len(lost) > 4 else "")
            note = f"the 2:4 zeros of {len(lost)} layers are gone after this step, and no target builds them as sparse"
            self.notes[number] = [f"{note}: {listed}"]
        for path, decision in plan.choice.items():
            choice = as_json(decision)
            layer = module_at(module, path)
            if not isinstance(choice, Mapping) or self.holds_one(layer, path):
                continue
            self.found.setdefault(path, {}).update(choice)
            if layer is not None:
                self.layers[path] = weakref.ref(layer)
                if choice.get("pattern") == PATTERN:
                    self.sparse[path] = layer

    def holds_one(self, layer: nn.Module | None, path: str) -> bool:
        """Whether a step put a layer around the one that was there, which what was said is of."""
        known = self.layers[path]() if path in self.layers else None
        inside = [] if layer is None or known is layer else list(layer.modules())
        return known is not None and any(each is known for each in inside)

    def of(self, network: nn.Module, module: nn.Module) -> dict[str, LayerHint]:
        """What targets are told about one exported network, by its own module paths.

        Args:
            network: the one that is exported; the whole model, or one of several networks in it.
            module: the whole optimized model.
        """
        at = {id(layer): path for path, layer in network.named_modules()}
        there = {id(layer) for layer in module.modules()}
        hints: dict[str, LayerHint] = {}
        for path, decision in self.found.items():
            hint = LayerHint.of(decision)
            layer = self.layers[path]() if path in self.layers else None
            if layer is None or id(layer) not in there:
                layer = module_at(module, path)  # a later step put another in its place
            if (name := at.get(id(layer))) is not None:
                hints[name] = hint if path in self.sparse else replace(hint, pattern="")
        return hints


def still_sparse(module: nn.Module, path: str, layer: nn.Module) -> bool:
    """Whether a layer of the 2:4 pattern has it still, where it was or where a later step put it."""
    now = module_at(module, path)
    if now is None or (now is not layer and not keeps_pattern(now)):
        now = next((each for each in module.modules() if each is layer), None)
    return now is not None and keeps_pattern(now)
