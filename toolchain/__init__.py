"""The way in and the whole run.

From Python, an artifact's engine takes the place of the module that it was made from::

    import enginewright

    pipe.transformer = enginewright.load("out")     # tensors in, tensors out, as the module had it
    module = enginewright.load_module("out")        # the optimized PyTorch module, for further training
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginewright.loaded import load as load
    from enginewright.loaded import load_module as load_module
    from enginewright.spec import ModelSpec as ModelSpec

__version__ = "0.1.0"
__all__ = ["ModelSpec", "__version__", "load", "load_module"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: the command line's help needs no backend."""
    if name in ("load", "load_module"):
        from enginewright import loaded

        return getattr(loaded, name)
    if name == "ModelSpec":
        from enginewright.spec import ModelSpec

        return ModelSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
