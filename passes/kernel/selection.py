"""Layers by their module paths: which a user wants left alone, and which lie within others."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError


def excluded_by(path: str, patterns: Sequence[str]) -> str:
    """The reason to skip a path that a pattern matches; empty when none does."""
    return next((f"excluded by {pattern!r}" for pattern in patterns if fnmatchcase(path, pattern)), "")


def is_within(path: str, around: str) -> bool:
    """Whether a module path is another one or lies below it; all lie below the empty one."""
    return not around or path == around or path.startswith(f"{around}.")


def without_layout(model: nn.Module, known: Iterable[str], names: Sequence[str], what: str) -> dict[str, str]:
    """Layers that are called like others and that no family knows, by path, and why none is cut.

    Args:
        model: to look through.
        known: paths of layers that a family has answered for; what lies around or within one is left out.
        names: parts of what the classes of such layers are called, in small letters.
        what: of a layer would have to be told apart.
    """
    answered = list(known)
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if any(name in kind.lower() for name in names) and not any(
            is_within(path, other) or is_within(other, path) for other in (*answered, *reasons)
        ):
            reasons[path] = f"no family knows how the {what} of a {kind} are laid out"
    return reasons


def refuse_meta(weights: Mapping[str, Iterable[Tensor]], reader: str) -> None:
    """Raise when weights have no values to read.

    Args:
        weights: of each layer, by path.
        reader: what must read them.
    """
    for path, own in weights.items():
        if any(weight.is_meta for weight in own):
            raise ToolchainError(
                f"{reader} must read the weights, and they are on the meta device, which holds no values",
                where=path,
                help="load the model's weights before planning, or replay a plan that was made with them",
            )


def other_matrices(model: nn.Module, named: Container[str], why: str) -> dict[str, str]:
    """Every other module that holds a float matrix of its own, by path, and what it holds: no report leaves one out.

    Args:
        model: to look through.
        named: paths of modules that the pass speaks of itself.
        why: the end of each reason.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        held = [name for name, p in module.named_parameters(recurse=False) if is_matrix(p)]
        if held and path not in named:
            found[path] = f"{type(module).__name__} (holds {', '.join(held)}): {why}"
    return found


def never_called(layer: nn.Linear) -> str:
    """Why a linear layer cannot be replaced although it is one; empty when it can.

    PyTorch's ``MultiheadAttention`` reads the weight of its output projection and does not call it.
    """
    kind = type(layer).__name__
    hidden = kind == "NonDynamicallyQuantizableLinear"
    return f"it is a {kind}, whose weight its attention reads without calling it" if hidden else ""


def is_matrix(weight: Tensor) -> bool:
    """Whether a tensor of floats has two sizes above 1."""
    return weight.is_floating_point() and sum(size > 1 for size in weight.shape) > 1


def check_patterns(patterns: Iterable[str], paths: Iterable[str], *, what: str, setting: str = "exclude") -> None:
    """Raise for a pattern that matches nothing: of one that should protect, it would be found out too late.

    Args:
        patterns: what the user wrote.
        paths: every layer that the pass could touch.
        what: what such layers are called in the error.
        setting: the parameter that holds the patterns.
    """
    known = list(paths)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in known):
            listed = ", ".join(known[:12]) + (", …" if len(known) > 12 else "") or "none"
            raise ToolchainError(f"{setting} {pattern!r} matches no {what}", help=f"{what}s: {listed}")
