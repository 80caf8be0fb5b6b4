"""Take trained PyTorch networks to production engines, and prove that nothing broke.

The commands are functions too::

    import enginewright

    report = enginewright.export("dit:digits", "out", ["prune_heads:share=0.25", "quantize_int8"], ["onnxruntime"])
    found = enginewright.compare("dit:digits", "out")

An artifact's engine takes the place of the module that it was made from::

    pipe.transformer = enginewright.load("out")     # tensors in, tensors out, as the module had it
    module = enginewright.load_module("out")        # the optimized PyTorch module, for further training

That of a whole pipeline gives the pipeline, run by the engines of all its networks::

    pipe = enginewright.load_pipeline("out")

An engine that takes adapters as inputs (the pass ``adapters_as_inputs``) is switched by what it is called with::

    image = engine(**call, **enginewright.adapter_inputs("out", "style.safetensors"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginewright.adapters import adapter_inputs as adapter_inputs
    from enginewright.api import bench as bench
    from enginewright.api import compare as compare
    from enginewright.api import export as export
    from enginewright.api import open as open
    from enginewright.api import plan as plan
    from enginewright.loaded import load as load
    from enginewright.loaded import load_module as load_module
    from enginewright.spec import ModelSpec as ModelSpec
    from enginewright.whole import load_pipeline as load_pipeline

__version__ = "0.1.0"
__all__ = [
    "ModelSpec",
    "__version__",
    "adapter_inputs",
    "bench",
    "compare",
    "export",
    "load",
    "load_module",
    "load_pipeline",
    "open",
    "plan",
]

_PLACES = {
    **dict.fromkeys(("bench", "compare", "export", "open", "plan"), "enginewright.api"),
    **dict.fromkeys(("load", "load_module"), "enginewright.loaded"),
    "ModelSpec": "enginewright.spec",
    "adapter_inputs": "enginewright.adapters",
    "load_pipeline": "enginewright.whole",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: the command line's help needs no backend."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *__all__})
