"""One file a metric; the file's name is the metric's name. Other installed packages add theirs by entry points."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from enginewright.ground import plugins

if TYPE_CHECKING:
    from enginewright.validation.contract import Metric


def load_metrics() -> dict[str, Metric]:
    """Every metric by name, in the order of the names. Imports them, and numpy with them."""
    ours = {found.name: f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__)}
    modules = plugins.installed("metrics") | ours
    return {name: _only_metric(modules[name]) for name in sorted(modules)}


def _only_metric(name: str) -> Metric:
    from enginewright.validation.contract import Metric  # numpy: not before it is needed

    module = importlib.import_module(name)
    own = [thing for thing in vars(module).values() if isinstance(thing, type) and thing.__module__ == module.__name__]
    metrics = [thing for thing in own if issubclass(thing, Metric)]
    if len(metrics) != 1:
        raise TypeError(f"{module.__name__} must define one metric; it defines {[each.__name__ for each in metrics]}")
    return metrics[0]()
