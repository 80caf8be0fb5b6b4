"""The whole job of a pipeline: what its parts do together, with the code between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from enginewright.ground.runner import Runner
from enginewright.ground.signature import Arrays


@dataclass(frozen=True, kw_only=True)
class Job:
    """A whole job on several networks.

    Args:
        parts: names of those that take part in it.
        calls: what it is tried on, a call of the runner each.
        assemble: networks by the part that each stands for (those that are left out are the original's own) -> the
            thing that users call, such as a pipeline of diffusers.
        run: the same thing -> a runner of the calls, whose outputs are the job's results.
        models: for each part the model string of its original, where the job has none of its own; the parts are then
            given as runners.
        rate: samples a second, where results called ``wave`` are sounds.
        notes: how it is run, as sentences without full stops.
    """

    parts: tuple[str, ...]
    calls: tuple[Arrays, ...]
    assemble: Callable[[Mapping[str, Any]], Any]
    run: Callable[[Any], Runner]
    models: Mapping[str, str] = field(default_factory=dict)
    rate: int = 0
    notes: tuple[str, ...] = ()
